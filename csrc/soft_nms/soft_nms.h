// What the Tensor boundary may call; raw pointers only. Boxes are (x1, y1, x2, y2); all buffers are dense.
#pragma once
#include <cstdint>

#include "../common/detections.h"

namespace ef::soft_nms {
template <typename scalar_t>
struct Problem {
  const scalar_t* boxes;   // [batch, n, 4]
  const scalar_t* scores;  // [batch, n]
  const int64_t* labels;   // [batch, n]
  int64_t batch, n, max_detections;
  bool gaussian;
  double sigma, iou_threshold, score_threshold;
};

// `workspace` holds workspace_bytes<scalar_t>(batch, n) bytes.
template <typename scalar_t>
void launch(Cpu, const Problem<scalar_t>& problem, void* workspace, const Detections<scalar_t>& out);
template <typename scalar_t>
void launch(Cuda, const Problem<scalar_t>& problem, void* workspace, const Detections<scalar_t>& out);
template <typename scalar_t>
int64_t workspace_bytes(Cpu, int64_t batch, int64_t n);
template <typename scalar_t>
int64_t workspace_bytes(Cuda, int64_t batch, int64_t n);
}  // namespace ef::soft_nms
