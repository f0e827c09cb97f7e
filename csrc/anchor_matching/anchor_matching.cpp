// Tensor boundary of anchor matching: check, allocate, dispatch the dtype once, register.
#include "anchor_matching.h"

#include <limits>
#include <tuple>

#include "../common/tensor.h"

namespace ef::anchor_matching {
namespace {
// Where it costs no synchronization, no object's box may be broken.
template <typename T>
void check_boxes(const Problem<T>& in) {
  for (int64_t image = 0; image < in.batch; ++image) {
    for (int64_t row = 0; row < in.rows(image); ++row) {
      if (in.labels[image * in.max_boxes + row] < 0) continue;
      const T* box = in.boxes + (image * in.max_boxes + row) * 4;
      const T width = box[2] - box[0], height = box[3] - box[1];
      STD_TORCH_CHECK(width >= 0 && width <= std::numeric_limits<T>::max() && height >= 0 && height <= std::numeric_limits<T>::max(),
                      "match_anchors: gt_boxes[", image, ", ", row, "] (image ", image, ", box ", row,
                      ") must be finite (x1, y1, x2, y2) with x1 <= x2 and y1 <= y2");
    }
  }
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> match(const Tensor& anchors, const Tensor& boxes, const Tensor& labels,
                                         const std::optional<Tensor>& counts, double positive, double negative, int64_t force,
                                         int64_t coder, bool any_box) {
  STD_TORCH_CHECK(anchors.dim() == 2 && anchors.size(1) == 4 && anchors.is_contiguous(),
                  "match_anchors: anchors must be contiguous [count, 4]");
  STD_TORCH_CHECK(boxes.dim() == 3 && boxes.size(2) == 4 && boxes.is_contiguous() && boxes.scalar_type() == anchors.scalar_type(),
                  "match_anchors: boxes must be contiguous [batch, max_boxes, 4], of the anchors' dtype");
  const int64_t count = anchors.size(0), batch = boxes.size(0), max_boxes = boxes.size(1);
  STD_TORCH_CHECK(is_plain(labels, {batch, max_boxes}, ScalarType::Long),
                  "match_anchors: labels must be contiguous int64 [batch, max_boxes]");
  STD_TORCH_CHECK(!counts || is_plain(*counts, {batch}, ScalarType::Long), "match_anchors: counts must be contiguous int64 [batch]");
  STD_TORCH_CHECK(max_boxes < (int64_t(1) << 31), "match_anchors: an image has at most 2^31 - 1 boxes");
  const bool is_double = anchors.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(is_double || anchors.scalar_type() == ScalarType::Float, "match_anchors: dtype must be float32 or float64");

  STD_TORCH_CHECK(0 < negative && negative <= positive, "match_anchors: thresholds must be 0 < negative <= positive");
  const auto force_rule = choice_of<ForcedMatch>(force, "match_anchors", "force");
  const auto box_coder = choice_of<BoxCoder>(coder, "match_anchors", "box_coder");

  const DeviceScope<Device> scope(anchors);
  Tensor out_labels = allocate(anchors, {batch, count}, ScalarType::Long);
  Tensor deltas = allocate(anchors, {batch, count, 4}, anchors.scalar_type());
  Tensor positives = allocate(anchors, {batch}, ScalarType::Long);
  if (std::is_same_v<Device, Cuda> || count == 0) torch::stable::zero_(positives);  // the CUDA kernel adds to them
  std::optional<Tensor> workspace;
  if (const int64_t size = workspace_size(scope.device, batch, max_boxes)) {
    workspace = allocate(anchors, {size}, ScalarType::Long);
    torch::stable::zero_(*workspace);
  }
  const auto run = [&]<typename T>() {
    const Problem<T> problem{const_data<T>(anchors),
                             const_data<T>(boxes),
                             const_data<int64_t>(labels),
                             const_data<int64_t>(counts),
                             count,
                             batch,
                             max_boxes,
                             static_cast<T>(positive),
                             static_cast<T>(negative),
                             force_rule,
                             box_coder,
                             any_box};
    if (!any_box && boxes.is_cpu()) check_boxes(problem);
    if (batch == 0 || count == 0) return;
    launch_match<T>(scope.device, problem, workspace ? mutable_data<int64_t>(*workspace) : nullptr,
                    {mutable_data<int64_t>(out_labels), mutable_data<T>(deltas), mutable_data<int64_t>(positives)});
  };
  is_double ? run.template operator()<double>() : run.template operator()<float>();
  return {out_labels, deltas, positives};
}

template <class Device>
void register_ops(torch::stable::detail::StableLibrary& m) {
  implement<"match_anchors", match<Device>>(m);
}
}  // namespace
}  // namespace ef::anchor_matching

EF_REGISTER(ef::anchor_matching::register_ops)
