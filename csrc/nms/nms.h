// What the Tensor boundary may call; raw pointers only. Boxes are (x1, y1, x2, y2); all buffers are dense.
#pragma once
#include <cstdint>

#include "../common/detections.h"
#include "../common/platform.h"

namespace ef::nms {
template <typename scalar_t>
struct Problem {
  const scalar_t* boxes;  // [batch, n, 4], of an image by class, then by descending score
  const int64_t* labels;  // [batch, n], ascending in an image; or null for one class
  int64_t batch, n;
  int64_t max_kept;  // of a class that are wanted
  double iou_threshold;
};

// keep[i]: no kept box before box i of its class overlaps it. Once `max_kept` of a class are kept, its later ones may be false. [batch, n]
// `workspace` holds workspace_size(batch, n) zeros.
template <typename scalar_t>
void launch_keep(Cpu, const Problem<scalar_t>& problem, int64_t* workspace, bool* keep);
template <typename scalar_t>
void launch_keep(Cuda, const Problem<scalar_t>& problem, int64_t* workspace, bool* keep);
int64_t workspace_size(Cpu, int64_t batch, int64_t n);
int64_t workspace_size(Cuda, int64_t batch, int64_t n);

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
void launch_padded(Cpu, const BatchProblem<scalar_t>& problem, const Detections<scalar_t>& out);
template <typename scalar_t>
void launch_padded(Cuda, const BatchProblem<scalar_t>& problem, const Detections<scalar_t>& out);
// The max_kept detections of an image that launch_padded finds: min(n, max_detections) may not be above it.
int64_t max_padded(Cpu);
int64_t max_padded(Cuda);
}  // namespace ef::nms
