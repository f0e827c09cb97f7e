// Tensor boundary of non-maximum suppression: check, allocate, dispatch the dtype once, register.
#include "nms.h"

#include <algorithm>
#include <tuple>

#include "../common/tensor.h"

namespace ef::nms {
namespace {
template <class Device>
Tensor keep(const Tensor& boxes, const std::optional<Tensor>& labels, double iou_threshold, int64_t max_kept) {
  STD_TORCH_CHECK(boxes.dim() == 3 && boxes.size(2) == 4 && boxes.is_contiguous(), "nms: boxes must be contiguous [batch, n, 4]");
  const int64_t batch = boxes.size(0), n = boxes.size(1);
  STD_TORCH_CHECK(!labels || is_plain(*labels, {batch, n}, ScalarType::Long), "nms: labels must be contiguous int64 [batch, n]");
  const DeviceScope<Device> scope(boxes);
  Tensor result = allocate(boxes, {batch, n}, ScalarType::Bool);
  if (batch * n == 0) return result;
  Tensor workspace = allocate(boxes, {workspace_size(scope.device, batch, n)}, ScalarType::Long);
  if (workspace.numel() > 0) torch::stable::zero_(workspace);
  dispatch_floating(boxes.scalar_type(), "nms", [&]<typename scalar_t>() {
    launch_keep<scalar_t>(scope.device, {const_data<scalar_t>(boxes), const_data<int64_t>(labels), batch, n, max_kept, iou_threshold},
                          mutable_data<int64_t>(workspace), mutable_data<bool>(result));
  });
  return result;
}

// The CUDA kernel passes over an index that is none: to look at them here would wait for the device.
[[maybe_unused]] void check_order(Cuda, const Tensor&, int64_t) {}
[[maybe_unused]] void check_order(Cpu, const Tensor& order, int64_t n) {
  const int64_t* indices = const_data<int64_t>(order);
  const bool in_range = std::all_of(indices, indices + order.numel(), [&](int64_t i) { return i >= 0 && i < n; });
  STD_TORCH_CHECK(in_range, "nms_padded: order must hold indices of boxes, in [0, ", n, ")");
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> padded(const Tensor& boxes, const Tensor& ranked_scores, const Tensor& order,
                                                          const Tensor& labels, double iou_threshold, std::optional<double> score_threshold,
                                                          int64_t max_detections) {
  STD_TORCH_CHECK(boxes.dim() == 3 && boxes.size(2) == 4 && boxes.is_contiguous(), "nms_padded: boxes must be contiguous [batch, n, 4]");
  const int64_t batch = boxes.size(0), n = boxes.size(1);
  STD_TORCH_CHECK(is_plain(ranked_scores, {batch, n}, boxes.scalar_type()),
                  "nms_padded: scores must be contiguous [batch, n], of the boxes' dtype");
  STD_TORCH_CHECK(is_plain(order, {batch, n}, ScalarType::Long) && is_plain(labels, {batch, n}, ScalarType::Long),
                  "nms_padded: order and labels must be contiguous int64 [batch, n]");
  STD_TORCH_CHECK(max_detections >= 1 && max_detections <= kMaxDetections, "nms_padded: max_detections must be in [1, 2^30]");
  check_order(Device{}, order, n);
  const DeviceScope<Device> scope(boxes);
  STD_TORCH_CHECK(std::min(n, max_detections) <= max_padded(scope.device), "nms_padded: an image can keep more than ",
                  max_padded(scope.device), " boxes");
  const DetectionTensors out(boxes, max_detections);
  if (batch > 0) {
    dispatch_floating(boxes.scalar_type(), "nms_padded", [&]<typename scalar_t>() {
      launch_padded<scalar_t>(
          scope.device,
          {const_data<scalar_t>(boxes), const_data<scalar_t>(ranked_scores), const_data<int64_t>(order), const_data<int64_t>(labels), batch,
           n, max_detections, iou_threshold, score_threshold.has_value(), score_threshold.value_or(0)},
          out.data<scalar_t>());
    });
  }
  return out.as_tuple();
}

template <class Device>
void register_ops(torch::stable::detail::StableLibrary& m) {
  implement<"nms", keep<Device>>(m);
  implement<"nms_padded", padded<Device>>(m);
}
}  // namespace
}  // namespace ef::nms

EF_REGISTER(ef::nms::register_ops)
