// Tensor boundary of the focal loss: check, allocate, dispatch the dtype once, register.
#include "focal_loss.h"

#include "../common/tensor.h"

namespace ef::focal_loss {
namespace {
// The kernels walk the memory in order, whichever it is.
bool is_like(const Tensor& x, const Tensor& logits) { return is_dense_like(x, logits, !logits.is_contiguous()); }

struct Arguments {
  const Tensor &logits, &targets;
  Options options;
  const std::optional<Tensor>& class_weight;
};

// `targets` is int64 with one label per row of the last dimension, or floating and like the logits.
template <typename scalar_t>
Problem<scalar_t> problem_of(const Arguments& arguments) {
  const Tensor &logits = arguments.logits, &targets = arguments.targets;
  const int64_t n = logits.numel(), classes = logits.dim() == 0 ? 1 : logits.size(logits.dim() - 1);
  STD_TORCH_CHECK(is_dense(logits), "focal_loss: logits must be contiguous or channels_last");
  Problem<scalar_t> problem{const_data<scalar_t>(logits),   nullptr, nullptr,          nullptr,
                            classes == 0 ? 0 : n / classes, classes, arguments.options};
  if (targets.scalar_type() == ScalarType::Long) {
    const auto sizes = logits.sizes(), label_sizes = targets.sizes();
    const bool fits = logits.dim() > 0 && std::equal(label_sizes.begin(), label_sizes.end(), sizes.begin(), sizes.end() - 1);
    STD_TORCH_CHECK(fits && logits.is_contiguous() && targets.is_contiguous(),
                    "focal_loss: labels need contiguous logits [..., classes] and contiguous labels [...]");
    check_labels(targets, classes, "focal_loss");
    problem.labels = const_data<int64_t>(targets);
  } else {
    STD_TORCH_CHECK(is_like(targets, logits), "focal_loss: targets must have the sizes, layout and dtype of the logits");
    problem.soft = const_data<scalar_t>(targets);
  }
  if (arguments.class_weight) {
    const Tensor& weight = *arguments.class_weight;
    STD_TORCH_CHECK(logits.is_contiguous() && is_plain(weight, {classes}, acc_dtype(logits.scalar_type())),
                    "focal_loss: class_weight needs contiguous logits [..., classes], and must be [classes], of the sum's dtype");
    problem.class_weight = const_data<acc_t<scalar_t>>(weight);
  }
  return problem;
}

template <class Device>
Tensor forward(const Tensor& logits, const Tensor& targets, double alpha, double gamma, double label_smoothing,
               const std::optional<Tensor>& class_weight) {
  const DeviceScope<Device> scope(logits);
  Tensor loss = allocate_like(logits);
  if (logits.numel() == 0) return loss;
  dispatch_floating(logits.scalar_type(), "focal_loss", [&]<typename scalar_t>() {
    launch_forward<scalar_t>(scope.device, problem_of<scalar_t>({logits, targets, {alpha, gamma, label_smoothing}, class_weight}),
                             mutable_data<scalar_t>(loss));
  });
  return loss;
}

template <class Device>
Tensor sum(const Tensor& logits, const Tensor& targets, double alpha, double gamma, double label_smoothing,
           const std::optional<Tensor>& class_weight) {
  const DeviceScope<Device> scope(logits);
  const ScalarType dtype = acc_dtype(logits.scalar_type());
  Tensor total = allocate(logits, {}, dtype);
  if (logits.numel() == 0) return torch::stable::zero_(total);
  dispatch_floating(logits.scalar_type(), "focal_loss_sum", [&]<typename scalar_t>() {
    using A = acc_t<scalar_t>;
    const Problem<scalar_t> problem = problem_of<scalar_t>({logits, targets, {alpha, gamma, label_smoothing}, class_weight});
    Tensor partials = allocate(logits, {partial_count(scope.device, problem.rows, problem.classes)}, dtype);
    launch_sum<scalar_t>(scope.device, problem, mutable_data<A>(partials), mutable_data<A>(total));
  });
  return total;
}

// `grad` is like the logits, or one value of the sum's dtype.
template <class Device>
Tensor backward(const Tensor& grad, const Tensor& logits, const Tensor& targets, double alpha, double gamma, double label_smoothing,
                const std::optional<Tensor>& class_weight) {
  const DeviceScope<Device> scope(logits);
  Tensor grad_logits = allocate_like(logits);
  if (logits.numel() == 0) return grad_logits;
  const bool of_sum = grad.dim() == 0 && grad.scalar_type() == acc_dtype(logits.scalar_type());
  STD_TORCH_CHECK(of_sum || is_like(grad, logits), "focal_loss_backward: grad must be like the logits, or one value of the sum's dtype");
  dispatch_floating(logits.scalar_type(), "focal_loss_backward", [&]<typename scalar_t>() {
    launch_backward<scalar_t>(scope.device, problem_of<scalar_t>({logits, targets, {alpha, gamma, label_smoothing}, class_weight}),
                              of_sum ? nullptr : const_data<scalar_t>(grad), of_sum ? const_data<acc_t<scalar_t>>(grad) : nullptr,
                              mutable_data<scalar_t>(grad_logits));
  });
  return grad_logits;
}

template <class Device>
void register_ops(torch::stable::detail::StableLibrary& m) {
  implement<"focal_loss", forward<Device>>(m);
  implement<"focal_loss_sum", sum<Device>>(m);
  implement<"focal_loss_backward", backward<Device>>(m);
}
}  // namespace
}  // namespace ef::focal_loss

EF_REGISTER(ef::focal_loss::register_ops)
