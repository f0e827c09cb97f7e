// What the Tensor boundary may call; raw pointers only. Boxes are (x1, y1, x2, y2); all buffers are dense.
#pragma once
#include <cstdint>

#include "../common/platform.h"

namespace ef::nms {
template <typename scalar_t>
struct Problem {
  const scalar_t* boxes;  // [n, 4], by class, then by descending score
  const int64_t* labels;  // [n], ascending, or null for one class
  int64_t n;
  double iou_threshold;
};

// keep[i]: no kept box before box i of its class overlaps it. [n]
// `workspace` holds workspace_size(n) zeros.
template <typename scalar_t>
void launch_keep(Cpu, const Problem<scalar_t>& problem, int64_t* workspace, bool* keep);
template <typename scalar_t>
void launch_keep(Cuda, const Problem<scalar_t>& problem, int64_t* workspace, bool* keep);
int64_t workspace_size(Cpu, int64_t n);
int64_t workspace_size(Cuda, int64_t n);

template <typename scalar_t>
struct BatchProblem {
  const scalar_t* boxes;          // [batch, n, 4]
  const scalar_t* ranked_scores;  // [batch, n], descending, NaN first
  const int64_t* order;           // [batch, n], which box has the rank
  const int64_t* labels;          // [batch, n], of the box
  int64_t batch, n, max_detections;
  double iou_threshold;
  bool has_score_threshold;
  double score_threshold;
};
template <typename scalar_t>
struct BatchDetections {
  scalar_t* boxes;   // [batch, max_detections, 4]
  scalar_t* scores;  // [batch, max_detections]
  int64_t* labels;   // [batch, max_detections]
  int64_t* indices;  // [batch, max_detections]
  int64_t* counts;   // [batch]
};

// `workspace` holds batch_workspace_bytes<scalar_t>(batch, slots) bytes; slots = min(n, max_detections), the most an image can keep.
template <typename scalar_t>
void launch_padded(Cpu, const BatchProblem<scalar_t>& problem, void* workspace, const BatchDetections<scalar_t>& out);
template <typename scalar_t>
void launch_padded(Cuda, const BatchProblem<scalar_t>& problem, void* workspace, const BatchDetections<scalar_t>& out);
template <typename scalar_t>
int64_t batch_workspace_bytes(Cpu, int64_t batch, int64_t slots);
template <typename scalar_t>
int64_t batch_workspace_bytes(Cuda, int64_t batch, int64_t slots);
}  // namespace ef::nms
