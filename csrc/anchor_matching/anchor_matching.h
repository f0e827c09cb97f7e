// What the Tensor boundary may call; raw pointers only. Boxes are (x1, y1, x2, y2); all buffers are dense. T is float or double.
#pragma once
#include <cstdint>

#include "../common/platform.h"
#include "anchor_matching_math.h"

namespace ef::anchor_matching {
template <typename T>
struct Problem {
  const T* anchors;       // [count, 4]
  const T* boxes;         // [batch, max_boxes, 4]
  const int64_t* labels;  // [batch, max_boxes]; negative: not an object
  const int64_t* counts;  // [batch], rows that may be objects, or null for all
  int64_t count, batch, max_boxes;
  T positive, negative;  // IoU from which on an anchor is positive, or not background; 0 < negative <= positive
  ForcedMatch force;
  BoxCoder coder;
  bool any_box;  // whether a box without area is an object too

  EF_HD int64_t rows(int64_t image) const {
    if (!counts) return max_boxes;
    return counts[image] < max_boxes ? counts[image] : max_boxes;
  }
  // Of a row below rows(image).
  EF_HD bool is_object(int64_t image, int64_t row) const {
    const int64_t i = image * max_boxes + row;
    const T* box = boxes + i * 4;
    return labels[i] >= 0 && (any_box || (box[0] != box[2] && box[1] != box[3]));
  }
};
template <typename T>
struct Targets {
  int64_t* labels;     // [batch, count]: a label, -1 background, -2 ignored
  T* deltas;           // [batch, count, 4]
  int64_t* positives;  // [batch]; zeros at first on CUDA
};

// `workspace` holds workspace_size(batch, max_boxes) zeros.
template <typename T>
void launch_match(Cpu, const Problem<T>& problem, int64_t* workspace, const Targets<T>& out);
template <typename T>
void launch_match(Cuda, const Problem<T>& problem, int64_t* workspace, const Targets<T>& out);
int64_t workspace_size(Cpu, int64_t batch, int64_t max_boxes);
int64_t workspace_size(Cuda, int64_t batch, int64_t max_boxes);
}  // namespace ef::anchor_matching
