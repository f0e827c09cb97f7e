// What the Tensor boundary may call; raw pointers only. An image's logits are numbered (level, row, column, anchor, class), whatever
// the layout in memory.
#pragma once
#include "../common/platform.h"
#include "decode_detections_math.h"

namespace ef::decode_detections {
template <typename scalar_t>
struct Level {
  const scalar_t* logits;  // [batch, anchors * classes, cells], or [batch, cells, anchors * classes] in channels_last
  const scalar_t* deltas;  // [batch, anchors * 4, cells], or [batch, cells, anchors * 4]
  int64_t cells;           // rows * columns
  int64_t first_cell;      // number of cells in the levels before
  bool logits_channels_last, deltas_channels_last;
};

template <typename scalar_t>
struct Problem {
  Level<scalar_t> levels[kMaxDecodedLevels];
  int level_count;
  const acc_t<scalar_t>* anchors;     // [anchors of an image, 4]
  const acc_t<scalar_t>* clip_sizes;  // [batch, 2] (height, width), or null
  int64_t batch, cells, anchors_per_cell, classes;
  int64_t candidates;  // taken of each image; 1 .. cells * anchors_per_cell * classes
  BoxCoder coder;

  EF_HD int64_t channels() const { return anchors_per_cell * classes; }
};

template <typename T>
struct Candidates {
  T* boxes;                 // [batch, candidates, 4]
  T* scores;                // [batch, candidates], descending, NaN first
  int64_t* labels;          // [batch, candidates]
  int64_t* anchor_indices;  // [batch, candidates]
};

// Writes the candidate of an image into its row: its score, class, anchor and box.
template <typename scalar_t>
EF_HD void write_candidate(const Problem<scalar_t>& in, int64_t image, int64_t rank, const Candidate<acc_t<scalar_t>>& candidate,
                           const Candidates<acc_t<scalar_t>>& out) {
  using A = acc_t<scalar_t>;
  const int64_t anchor = candidate.index / in.classes, row = image * in.candidates + rank;
  const int64_t number = anchor / in.anchors_per_cell, a = anchor - number * in.anchors_per_cell;
  int l = 0;
  while (l + 1 < in.level_count && number >= in.levels[l + 1].first_cell) ++l;
  const Level<scalar_t>& level = in.levels[l];
  const int64_t cell = number - level.first_cell, values = in.anchors_per_cell * 4;
  const scalar_t* deltas = level.deltas + image * level.cells * values;
  A delta[4], corners[4];
  for (int k = 0; k < 4; ++k) {
    delta[k] = A(deltas[level.deltas_channels_last ? cell * values + a * 4 + k : (a * 4 + k) * level.cells + cell]);
    corners[k] = in.anchors[anchor * 4 + k];
  }
  decode(delta, corners, in.coder);
  for (int k = 0; k < 4; ++k) {
    out.boxes[row * 4 + k] = in.clip_sizes ? clip(corners[k], in.clip_sizes[image * 2 + (k % 2 == 0)]) : corners[k];
  }
  out.scores[row] = score_of<A>(candidate.key);
  out.labels[row] = candidate.index - anchor * in.classes;
  out.anchor_indices[row] = anchor;
}

// The first `candidates` of each image in the order of is_before. `state` holds state_bytes(problem) zeros, `list` list_bytes(problem)
// bytes.
template <typename scalar_t>
void launch(Cpu, const Problem<scalar_t>& problem, void* state, void* list, const Candidates<acc_t<scalar_t>>& out);
template <typename scalar_t>
void launch(Cuda, const Problem<scalar_t>& problem, void* state, void* list, const Candidates<acc_t<scalar_t>>& out);
template <typename scalar_t>
int64_t state_bytes(Cpu, const Problem<scalar_t>& problem);
template <typename scalar_t>
int64_t state_bytes(Cuda, const Problem<scalar_t>& problem);
template <typename scalar_t>
int64_t list_bytes(Cpu, const Problem<scalar_t>& problem);
template <typename scalar_t>
int64_t list_bytes(Cuda, const Problem<scalar_t>& problem);
}  // namespace ef::decode_detections
