// Tensor boundary of the decoding of candidates: check, allocate, dispatch the dtype once, register.
#include "decode_detections.h"

#include <algorithm>
#include <tuple>

#include "../common/tensor.h"

namespace ef::decode_detections {
namespace {
// Whether images are [cells, channels] in memory; throws where they are neither that nor [channels, cells].
bool is_channels_last(const Tensor& x) {
  if (is_dense(x, false)) return false;
  STD_TORCH_CHECK(is_dense(x, true), "decode_candidates: outputs must be dense, NCHW or channels_last");
  return true;
}

template <typename scalar_t>
Problem<scalar_t> problem_of(const std::vector<Tensor>& cls_outputs, const std::vector<Tensor>& box_outputs, const Tensor& anchors,
                             const std::optional<Tensor>& clip_sizes, int64_t classes, int64_t max_candidates, int64_t box_coder) {
  const Tensor& first = cls_outputs[0];
  Problem<scalar_t> problem{};
  problem.level_count = int(cls_outputs.size());
  problem.batch = first.size(0);
  problem.anchors_per_cell = first.size(1) / classes;
  problem.classes = classes;
  problem.coder = choice_of(box_coder, "decode_candidates", "box_coder", BoxCoder::kEffdet);
  for (int i = 0; i < problem.level_count; ++i) {
    const Tensor &logits = cls_outputs[i], &deltas = box_outputs[i];
    STD_TORCH_CHECK(logits.dim() == 4 && deltas.dim() == 4 && logits.size(0) == problem.batch && deltas.size(0) == problem.batch &&
                        logits.size(1) == problem.channels() && deltas.size(1) == problem.anchors_per_cell * 4 &&
                        logits.size(2) == deltas.size(2) && logits.size(3) == deltas.size(3) &&
                        logits.scalar_type() == first.scalar_type() && deltas.scalar_type() == first.scalar_type(),
                    "decode_candidates: outputs must be [batch, anchors * classes, h, w] and [batch, anchors * 4, h, w] of one dtype");
    const int64_t cells = logits.size(2) * logits.size(3);
    problem.levels[i] = {const_data<scalar_t>(logits), const_data<scalar_t>(deltas), cells, problem.cells,
                         is_channels_last(logits),     is_channels_last(deltas)};
    problem.cells += cells;
  }
  const ScalarType dtype = acc_dtype(first.scalar_type());
  STD_TORCH_CHECK(is_plain(anchors, {problem.cells * problem.anchors_per_cell, 4}, dtype),
                  "decode_candidates: anchors must be contiguous float32 (float64 for float64 outputs), a row per anchor");
  STD_TORCH_CHECK(!clip_sizes || is_plain(*clip_sizes, {problem.batch, 2}, dtype),
                  "decode_candidates: clip_sizes must be contiguous [batch, 2], dtype of the anchors");
  problem.anchors = const_data<acc_t<scalar_t>>(anchors);
  problem.clip_sizes = const_data<acc_t<scalar_t>>(clip_sizes);
  STD_TORCH_CHECK(problem.batch <= 65535 && problem.cells * problem.channels() < int64_t(1) << 32,
                  "decode_candidates: at most 65535 images, and 2^32 - 1 logits an image");
  problem.candidates = std::min(max_candidates, problem.cells * problem.channels());
  return problem;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> decode(const std::vector<Tensor>& cls_outputs, const std::vector<Tensor>& box_outputs,
                                                  const Tensor& anchors, const std::optional<Tensor>& clip_sizes, int64_t num_classes,
                                                  int64_t max_candidates, int64_t box_coder) {
  STD_TORCH_CHECK(!cls_outputs.empty() && cls_outputs.size() <= kMaxDecodedLevels && cls_outputs.size() == box_outputs.size(),
                  "decode_candidates: 1 to ", kMaxDecodedLevels, " levels");
  STD_TORCH_CHECK(cls_outputs[0].dim() == 4 && num_classes >= 1 && cls_outputs[0].size(1) % num_classes == 0 && max_candidates >= 1,
                  "decode_candidates: num_classes must divide the channels, max_candidates be at least 1");
  const DeviceScope<Device> scope(anchors);
  std::tuple<Tensor, Tensor, Tensor, Tensor> out;
  dispatch_floating(cls_outputs[0].scalar_type(), "decode_candidates", [&]<typename scalar_t>() {
    using A = acc_t<scalar_t>;
    const auto problem = problem_of<scalar_t>(cls_outputs, box_outputs, anchors, clip_sizes, num_classes, max_candidates, box_coder);
    const int64_t batch = problem.batch, count = problem.candidates;
    Tensor boxes = allocate(anchors, {batch, count, 4}, anchors.scalar_type());
    Tensor scores = allocate(anchors, {batch, count}, anchors.scalar_type());
    Tensor labels = allocate(anchors, {batch, count}, ScalarType::Long);
    Tensor anchor_indices = allocate(anchors, {batch, count}, ScalarType::Long);
    if (batch * count > 0) {
      Tensor state = allocate(anchors, {state_bytes<scalar_t>(scope.device, problem)}, ScalarType::Byte);
      Tensor list = allocate(anchors, {list_bytes<scalar_t>(scope.device, problem)}, ScalarType::Byte);
      if (state.numel() > 0) torch::stable::zero_(state);
      launch<scalar_t>(
          scope.device, problem, state.mutable_data_ptr(), list.mutable_data_ptr(),
          {mutable_data<A>(boxes), mutable_data<A>(scores), mutable_data<int64_t>(labels), mutable_data<int64_t>(anchor_indices)});
    }
    out = {boxes, scores, labels, anchor_indices};
  });
  return out;
}

template <class Device>
void register_ops(torch::stable::detail::StableLibrary& m) {
  implement<"decode_candidates", decode<Device>>(m);
}
}  // namespace
}  // namespace ef::decode_detections

EF_REGISTER(ef::decode_detections::register_ops)
