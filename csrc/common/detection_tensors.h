// The five outputs of an op that detects.
#pragma once
#include <tuple>

#include "detections.h"
#include "tensor.h"

namespace ef {
inline constexpr int64_t kMostDetections = 1 << 30;  // rows of an image are counted in 32 bits

struct DetectionTensors {
  Tensor boxes, scores, labels, indices, counts;

  // Of images with boxes [batch, n, 4], `most` rows each.
  DetectionTensors(const Tensor& like, int64_t most)
      : boxes(allocate(like, {like.size(0), most, 4}, like.scalar_type())),
        scores(allocate(like, {like.size(0), most}, like.scalar_type())),
        labels(allocate(like, {like.size(0), most}, ScalarType::Long)),
        indices(allocate(like, {like.size(0), most}, ScalarType::Long)),
        counts(allocate(like, {like.size(0)}, ScalarType::Long)) {}

  template <typename scalar_t>
  Detections<scalar_t> data() const {
    return {mutable_data<scalar_t>(boxes), mutable_data<scalar_t>(scores), mutable_data<int64_t>(labels), mutable_data<int64_t>(indices),
            mutable_data<int64_t>(counts)};
  }
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> as_tuple() const { return {boxes, scores, labels, indices, counts}; }
};
}  // namespace ef
