// Tensor boundary of the focal loss: check, allocate, dispatch the dtype once, register.
#include "focal_loss.h"

#include "../common/tensor.h"

namespace ef::focal_loss {
namespace {
// `targets` is int64 with one label per row of the last dimension, or floating with the shape and strides of `logits`; both dense.
template <typename scalar_t>
Problem<scalar_t> problem_of(const Tensor& logits, const Tensor& targets, const Options& options) {
  const int64_t n = logits.numel(), classes = logits.dim() == 0 ? 1 : logits.size(logits.dim() - 1);
  Problem<scalar_t> problem{const_data<scalar_t>(logits), nullptr, nullptr, classes == 0 ? 0 : n / classes, classes, options};
  if (targets.scalar_type() == ScalarType::Long) {
    STD_TORCH_CHECK(targets.numel() == problem.rows && logits.is_contiguous() && targets.is_contiguous(),
                    "focal_loss: labels need contiguous logits [..., classes] and contiguous labels [...]");
    problem.labels = const_data<int64_t>(targets);
  } else {
    STD_TORCH_CHECK(targets.scalar_type() == logits.scalar_type() && targets.numel() == n, "focal_loss: targets must be like the logits");
    problem.soft = const_data<scalar_t>(targets);
  }
  return problem;
}

template <class Device>
Tensor forward(const Tensor& logits, const Tensor& targets, double alpha, double gamma, double label_smoothing) {
  const DeviceScope<Device> scope(logits);
  Tensor loss = allocate_like(logits);
  if (logits.numel() == 0) return loss;
  dispatch_floating(logits.scalar_type(), "focal_loss", [&]<typename scalar_t>() {
    launch_forward<scalar_t>(scope.device, problem_of<scalar_t>(logits, targets, {alpha, gamma, label_smoothing}),
                             mutable_data<scalar_t>(loss));
  });
  return loss;
}

template <class Device>
Tensor sum(const Tensor& logits, const Tensor& targets, double alpha, double gamma, double label_smoothing) {
  const DeviceScope<Device> scope(logits);
  const ScalarType dtype = acc_dtype(logits.scalar_type());
  Tensor total = allocate(logits, {}, dtype);
  if (logits.numel() == 0) return torch::stable::zero_(total);
  dispatch_floating(logits.scalar_type(), "focal_loss_sum", [&]<typename scalar_t>() {
    using A = acc_t<scalar_t>;
    const Problem<scalar_t> problem = problem_of<scalar_t>(logits, targets, {alpha, gamma, label_smoothing});
    Tensor partials = allocate(logits, {partial_count(scope.device, problem.rows, problem.classes)}, dtype);
    launch_sum<scalar_t>(scope.device, problem, mutable_data<A>(partials), mutable_data<A>(total));
  });
  return total;
}

// `grad` is like the logits, or one value of the sum's dtype.
template <class Device>
Tensor backward(const Tensor& grad, const Tensor& logits, const Tensor& targets, double alpha, double gamma, double label_smoothing) {
  const DeviceScope<Device> scope(logits);
  Tensor grad_logits = allocate_like(logits);
  if (logits.numel() == 0) return grad_logits;
  const bool of_sum = grad.dim() == 0 && grad.scalar_type() == acc_dtype(logits.scalar_type());
  STD_TORCH_CHECK(of_sum || (grad.numel() == logits.numel() && grad.scalar_type() == logits.scalar_type()),
                  "focal_loss_backward: grad must be like the logits, or one value");
  dispatch_floating(logits.scalar_type(), "focal_loss_backward", [&]<typename scalar_t>() {
    launch_backward<scalar_t>(scope.device, problem_of<scalar_t>(logits, targets, {alpha, gamma, label_smoothing}),
                              of_sum ? nullptr : const_data<scalar_t>(grad), of_sum ? const_data<acc_t<scalar_t>>(grad) : nullptr,
                              mutable_data<scalar_t>(grad_logits));
  });
  return grad_logits;
}

template <class Device>
void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("focal_loss", TORCH_BOX(&forward<Device>));
  m.impl("focal_loss_sum", TORCH_BOX(&sum<Device>));
  m.impl("focal_loss_backward", TORCH_BOX(&backward<Device>));
}
}  // namespace
}  // namespace ef::focal_loss

EF_REGISTER(ef::focal_loss::register_ops)
