// Tensor boundary of the detection loss: check, allocate, dispatch the dtype once, register.
#include "detection_loss.h"

#include <tuple>

#include "../common/tensor.h"

namespace ef::detection_loss {
namespace {
using Tensors = std::vector<Tensor>;

struct Inputs {
  const Tensors &cls, &box;
  const Tensor &labels, &box_targets;
  const std::optional<Tensor>& anchors;
  const Tensor& num_positives;
  const std::optional<Tensor>& class_weight;
  int64_t classes;
  double alpha, gamma, label_smoothing;
  int64_t box_loss, box_coder;
  double delta, box_loss_weight;
  int64_t normalizer;
  const std::vector<bool>& channels_last;  // of the class levels, then of the box levels
};

const Tensor& first_of(const Tensors& cls, int64_t classes) {
  STD_TORCH_CHECK(!cls.empty() && cls[0].dim() == 4 && classes >= 1,
                  "detection_loss: outputs must be [B, A * classes, H, W], classes at least 1");
  return cls[0];
}

// [B, C, H, W] whose pixels lie in steps of one stride, and whose channels or pixels are innermost.
template <typename scalar_t>
Output<scalar_t> output_of(const Tensor& x, bool channels_last) {
  const int64_t h = x.size(2), w = x.size(3), pixel_stride = w > 1 ? x.stride(3) : x.stride(2);
  const bool one_stride = h <= 1 || w <= 1 || x.stride(2) == w * x.stride(3);
  const bool fits = channels_last ? x.size(1) == 1 || x.stride(1) == 1 : h * w == 1 || pixel_stride == 1;
  STD_TORCH_CHECK(x.numel() == 0 || (one_stride && fits), "detection_loss: an output's channels or pixels must be innermost");
  return {const_data<scalar_t>(x), nullptr, x.stride(0), x.stride(1), pixel_stride, channels_last};
}

template <typename A>
const A* upstream_of(const std::optional<Tensor>& grad, ScalarType dtype) {
  STD_TORCH_CHECK(!grad.has_value() || (grad->numel() == 1 && grad->scalar_type() == dtype),
                  "detection_loss_backward: an upstream gradient must be one value of the loss's dtype");
  return const_data<A>(grad);
}

template <typename scalar_t>
Problem<scalar_t> problem_of(const Inputs& in) {
  using A = acc_t<scalar_t>;
  const ScalarType dtype = in.cls[0].scalar_type(), acc = acc_dtype(dtype);
  STD_TORCH_CHECK(in.cls.size() <= kMaxLevels && in.box.size() == in.cls.size() && in.channels_last.size() == 2 * in.cls.size(),
                  "detection_loss: 1 to ", kMaxLevels, " levels of class and of box outputs, and the layout of each");
  Problem<scalar_t> p{};
  p.level_count = int(in.cls.size());
  p.images = in.cls[0].size(0);
  p.classes = in.classes;
  p.per_cell = in.cls[0].size(1) / in.classes;
  for (int i = 0; i < p.level_count; ++i) {
    const Tensor &cls = in.cls[i], &box = in.box[i];
    STD_TORCH_CHECK(cls.dim() == 4 && box.dim() == 4 && cls.scalar_type() == dtype && box.scalar_type() == dtype &&
                        cls.size(0) == p.images && box.size(0) == p.images && cls.size(1) == p.per_cell * p.classes &&
                        box.size(1) == 4 * p.per_cell && cls.size(2) == box.size(2) && cls.size(3) == box.size(3),
                    "detection_loss: outputs must be [B, A * classes, H, W] and [B, A * 4, H, W] of one dtype");
    const int64_t pixels = cls.size(2) * cls.size(3);
    p.levels[i] = {output_of<scalar_t>(cls, in.channels_last[i]), output_of<scalar_t>(box, in.channels_last[p.level_count + i]), pixels,
                   p.anchors};
    p.anchors += pixels * p.per_cell;
  }
  const bool wide = in.labels.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(is_plain(in.labels, {p.images, p.anchors}, wide ? ScalarType::Long : ScalarType::Int) &&
                      is_plain(in.box_targets, {p.images, p.anchors, 4}, acc),
                  "detection_loss: labels must be contiguous int64 or int32 [B, N], box_targets contiguous [B, N, 4] of the loss's dtype");
  check_labels(in.labels, p.classes, "detection_loss");
  p.labels = {wide ? const_data<int64_t>(in.labels) : nullptr, wide ? nullptr : const_data<int32_t>(in.labels)};
  p.box_targets = const_data<A>(in.box_targets);
  p.box = {choice_of<BoxLoss>(in.box_loss, "detection_loss", "box_loss"),
           choice_of(in.box_coder, "detection_loss", "box_coder", BoxCoder::kEffdet), A(in.delta)};
  STD_TORCH_CHECK(in.anchors ? is_plain(*in.anchors, {p.anchors, 4}, acc) : p.box.loss != BoxLoss::kGiou,
                  "detection_loss: anchors must be contiguous [N, 4] of the loss's dtype");
  p.anchor_boxes = const_data<A>(in.anchors);
  p.normalizer = choice_of<LossNormalizer>(in.normalizer, "detection_loss", "normalizer");
  STD_TORCH_CHECK(in.num_positives.scalar_type() == acc && in.num_positives.is_contiguous() &&
                      (p.normalizer == LossNormalizer::kBatch || in.num_positives.numel() == p.images),
                  "detection_loss: num_positives must be contiguous, of the loss's dtype, one per image");
  p.positives = const_data<A>(in.num_positives);
  p.positive_count = in.num_positives.numel();
  p.gamma = in.gamma;
  p.focal = focal_loss::Parameters<A>::of(in.alpha, in.gamma, in.label_smoothing);
  STD_TORCH_CHECK(!in.class_weight || is_plain(*in.class_weight, {p.classes}, acc),
                  "detection_loss: class_weight must be contiguous [classes], of the loss's dtype");
  p.class_weight = const_data<A>(in.class_weight);
  p.box_loss_weight = A(in.box_loss_weight);
  return p;
}

// Allocates the gradient of every output, dense, in the layout the output is read in.
template <typename scalar_t>
Tensors allocate_gradients(const Inputs& in, Problem<scalar_t>& p) {
  Tensors grads;
  const auto gradient_of = [&](const Tensor& x, bool channels_last) {
    grads.push_back(allocate(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type(), channels_last));
    return mutable_data<scalar_t>(grads.back());
  };
  for (int i = 0; i < p.level_count; ++i) p.levels[i].cls.grad = gradient_of(in.cls[i], in.channels_last[i]);
  for (int i = 0; i < p.level_count; ++i) p.levels[i].box.grad = gradient_of(in.box[i], in.channels_last[p.level_count + i]);
  p.with_grad = true;
  return grads;
}

template <class Device, typename scalar_t>
void launch_with_workspace(const DeviceScope<Device>& scope, const Tensor& like, const Problem<scalar_t>& p,
                           Losses<acc_t<scalar_t>> losses) {
  Tensor partials = allocate(like, {2 * partial_count(scope.device, p)}, acc_dtype(like.scalar_type()));
  launch_detection_loss<scalar_t>(scope.device, p, mutable_data<acc_t<scalar_t>>(partials), losses);
}

// The losses, and `with_grad` the gradients of all outputs for an upstream gradient of 1 for the total, else none.
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensors> forward(const Tensors& cls, const Tensors& box, const Tensor& labels, const Tensor& box_targets,
                                                    const std::optional<Tensor>& anchors, const Tensor& num_positives,
                                                    const std::optional<Tensor>& class_weight, int64_t num_classes, double alpha,
                                                    double gamma, double label_smoothing, int64_t box_loss, int64_t box_coder, double delta,
                                                    double box_loss_weight, int64_t normalizer, const std::vector<bool>& channels_last,
                                                    bool with_grad) {
  const Tensor& first = first_of(cls, num_classes);
  const DeviceScope<Device> scope(first);
  const ScalarType acc = acc_dtype(first.scalar_type());
  Tensor total = allocate(first, {}, acc), cls_loss = allocate(first, {}, acc), box_loss_value = allocate(first, {}, acc);
  Tensors grads;
  dispatch_floating(first.scalar_type(), "detection_loss", [&]<typename scalar_t>() {
    using A = acc_t<scalar_t>;
    const Inputs in{cls,          box,         labels,          box_targets, anchors,         num_positives,
                    class_weight, num_classes, alpha,           gamma,       label_smoothing, box_loss,
                    box_coder,    delta,       box_loss_weight, normalizer,  channels_last};
    Problem<scalar_t> p = problem_of<scalar_t>(in);
    if (with_grad) grads = allocate_gradients(in, p);
    launch_with_workspace(scope, first, p, {mutable_data<A>(total), mutable_data<A>(cls_loss), mutable_data<A>(box_loss_value)});
  });
  return {total, cls_loss, box_loss_value, grads};
}

// The gradients of all outputs, for an upstream gradient of each result (none: 0).
template <class Device>
Tensors backward(const std::optional<Tensor>& grad_total, const std::optional<Tensor>& grad_cls, const std::optional<Tensor>& grad_box,
                 const Tensors& cls, const Tensors& box, const Tensor& labels, const Tensor& box_targets,
                 const std::optional<Tensor>& anchors, const Tensor& num_positives, const std::optional<Tensor>& class_weight,
                 int64_t num_classes, double alpha, double gamma, double label_smoothing, int64_t box_loss, int64_t box_coder, double delta,
                 double box_loss_weight, int64_t normalizer, const std::vector<bool>& channels_last) {
  const Tensor& first = first_of(cls, num_classes);
  const DeviceScope<Device> scope(first);
  const ScalarType acc = acc_dtype(first.scalar_type());
  Tensors grads;
  dispatch_floating(first.scalar_type(), "detection_loss_backward", [&]<typename scalar_t>() {
    using A = acc_t<scalar_t>;
    const Inputs in{cls,          box,         labels,          box_targets, anchors,         num_positives,
                    class_weight, num_classes, alpha,           gamma,       label_smoothing, box_loss,
                    box_coder,    delta,       box_loss_weight, normalizer,  channels_last};
    Problem<scalar_t> p = problem_of<scalar_t>(in);
    p.upstream = {upstream_of<A>(grad_total, acc), upstream_of<A>(grad_cls, acc), upstream_of<A>(grad_box, acc)};
    grads = allocate_gradients(in, p);
    launch_with_workspace(scope, first, p, {});
  });
  return grads;
}

// Brings gradients for an upstream gradient of 1 for the total, in place, to those for other ones.
template <class Device>
void rescale(const Tensors& grads, double box_loss_weight, const std::optional<Tensor>& grad_total, const std::optional<Tensor>& grad_cls,
             const std::optional<Tensor>& grad_box) {
  STD_TORCH_CHECK(!grads.empty() && grads.size() <= 2 * kMaxLevels && grads.size() % 2 == 0, "detection_loss_rescale_: gradients of 1 to ",
                  kMaxLevels, " levels");
  const Tensor& first = grads[0];
  const DeviceScope<Device> scope(first);
  const ScalarType acc = acc_dtype(first.scalar_type());
  dispatch_floating(first.scalar_type(), "detection_loss_rescale_", [&]<typename scalar_t>() {
    using A = acc_t<scalar_t>;
    Gradients<scalar_t> g{};
    g.levels = int(grads.size());
    g.cls_levels = g.levels / 2;
    for (int i = 0; i < g.levels; ++i) {
      STD_TORCH_CHECK(grads[i].scalar_type() == first.scalar_type() && grads[i].dim() == 4 && is_dense(grads[i]),
                      "detection_loss_rescale_: gradients must be dense [B, C, H, W] of one dtype");
      g.grad[i] = mutable_data<scalar_t>(grads[i]);
      g.count[i] = grads[i].numel();
    }
    g.box_loss_weight = A(box_loss_weight);
    g.upstream = {upstream_of<A>(grad_total, acc), upstream_of<A>(grad_cls, acc), upstream_of<A>(grad_box, acc)};
    launch_rescale<scalar_t>(scope.device, g);
  });
}

template <class Device>
void register_ops(torch::stable::detail::StableLibrary& m) {
  implement<"detection_loss", forward<Device>>(m);
  implement<"detection_loss_backward", backward<Device>>(m);
  implement<"detection_loss_rescale_", rescale<Device>>(m);
}
}  // namespace
}  // namespace ef::detection_loss

EF_REGISTER(ef::detection_loss::register_ops)
