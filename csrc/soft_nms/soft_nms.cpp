// Tensor boundary of soft non-maximum suppression: check, allocate, dispatch the dtype once, register.
#include "soft_nms.h"

#include <tuple>

#include "../common/tensor.h"

namespace ef::soft_nms {
namespace {
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> detect(const Tensor& boxes, const Tensor& scores, const Tensor& labels, int64_t method,
                                                          double sigma, double iou_threshold, double score_threshold,
                                                          int64_t max_detections) {
  STD_TORCH_CHECK(boxes.dim() == 3 && boxes.size(2) == 4 && boxes.is_contiguous(), "soft_nms: boxes must be contiguous [batch, n, 4]");
  const int64_t batch = boxes.size(0), n = boxes.size(1);
  STD_TORCH_CHECK(is_plain(scores, {batch, n}, boxes.scalar_type()), "soft_nms: scores must be contiguous [batch, n], of the boxes' dtype");
  STD_TORCH_CHECK(is_plain(labels, {batch, n}, ScalarType::Long), "soft_nms: labels must be contiguous int64 [batch, n]");
  STD_TORCH_CHECK(n <= kMaxDetections && max_detections >= 1 && max_detections <= kMaxDetections,
                  "soft_nms: max_detections must be in [1, 2^30], and an image has at most 2^30 boxes");
  const auto decay = choice_of(method, "soft_nms", "method", NmsMethod::kGaussian);
  const DeviceScope<Device> scope(boxes);
  const DetectionTensors out(boxes, max_detections);
  if (batch > 0) {
    dispatch_floating(boxes.scalar_type(), "soft_nms", [&]<typename scalar_t>() {
      Tensor workspace = allocate(boxes, {workspace_bytes<scalar_t>(scope.device, batch, n)}, ScalarType::Byte);
      launch<scalar_t>(scope.device,
                       {const_data<scalar_t>(boxes), const_data<scalar_t>(scores), const_data<int64_t>(labels), batch, n, max_detections,
                        decay == NmsMethod::kGaussian, sigma, iou_threshold, score_threshold},
                       workspace.mutable_data_ptr(), out.data<scalar_t>());
    });
  }
  return out.as_tuple();
}

template <class Device>
void register_ops(torch::stable::detail::StableLibrary& m) {
  implement<"soft_nms", detect<Device>>(m);
}
}  // namespace
}  // namespace ef::soft_nms

EF_REGISTER(ef::soft_nms::register_ops)
