// Tensor boundary of batch normalization: check, allocate, dispatch the dtype once, register.
#include "batch_norm_act.h"

#include <tuple>

#include "../common/tensor.h"

namespace ef::batch_norm_act {
namespace {
// A guard behind the checks in Python: nothing below may read or write outside the tensors.
Shape checked_shape(const Tensor& x, bool channels_last) {
  STD_TORCH_CHECK(x.dim() == 4 && is_dense(x, channels_last), "batch_norm_act: x must be dense [n, c, h, w]");
  const int64_t pixels = x.size(2) * x.size(3);
  return channels_last || pixels == 1 ? Shape{x.size(0) * pixels, x.size(1), 1} : Shape{x.size(0), x.size(1), pixels};
}
void check_channels(const Tensor& values, const Tensor& x, int64_t rows = 1) {
  STD_TORCH_CHECK(values.numel() == rows * x.size(1) && values.is_contiguous() && values.scalar_type() == acc_dtype(x.scalar_type()),
                  "batch_norm_act: what belongs to a channel must be dense [c], in the dtype of the arithmetic");
}
void check_gradient(const Tensor& grad, const Tensor& x, bool channels_last) {
  STD_TORCH_CHECK(is_dense_like(grad, x, channels_last), "batch_norm_act: grad must be dense and like x");
}

template <typename A>
Norm<A> norm_of(const Tensor& x, const Tensor& mean, const Tensor& var, const std::optional<Tensor>& weight,
                const std::optional<Tensor>& bias, double eps, int64_t activation) {
  check_channels(mean, x);
  check_channels(var, x);
  if (weight) check_channels(*weight, x);
  if (bias) check_channels(*bias, x);
  return {const_data<A>(mean),
          const_data<A>(var),
          const_data<A>(weight),
          const_data<A>(bias),
          A(eps),
          activation_of(activation, "batch_norm_act")};
}

Tensor allocate_output(const Tensor& x, bool channels_last) {
  return allocate(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type(), channels_last);
}
Tensor allocate_channels(const Tensor& x) { return allocate(x, {x.size(1)}, acc_dtype(x.scalar_type())); }
template <class Device>
Tensor allocate_partials(Device device, const Tensor& x, const Shape& shape) {
  return allocate(x, {partial_count(device, shape), 3, shape.c}, acc_dtype(x.scalar_type()));
}

template <class Device>
std::tuple<Tensor, Tensor> stats(const Tensor& x, bool channels_last) {
  const DeviceScope<Device> scope(x);
  const Shape shape = checked_shape(x, channels_last);
  Tensor mean = allocate_channels(x), var = allocate_channels(x);
  if (x.numel() == 0) return {torch::stable::zero_(mean), torch::stable::zero_(var)};
  Tensor partials = allocate_partials(scope.device, x, shape);
  dispatch_floating(x.scalar_type(), "batch_norm_stats", [&]<typename scalar_t>() {
    using A = acc_t<scalar_t>;
    const Statistics<A> statistics{mutable_data<A>(mean), mutable_data<A>(var), nullptr, nullptr, A(0)};
    launch_stats<scalar_t>(scope.device, shape, const_data<scalar_t>(x), mutable_data<A>(partials), statistics);
  });
  return {mean, var};
}

template <class Device>
Tensor forward(const Tensor& x, const Tensor& mean, const Tensor& var, const std::optional<Tensor>& weight,
               const std::optional<Tensor>& bias, double eps, int64_t activation, bool channels_last) {
  const DeviceScope<Device> scope(x);
  const Shape shape = checked_shape(x, channels_last);
  Tensor y = allocate_output(x, channels_last);
  if (x.numel() == 0) return y;
  dispatch_floating(x.scalar_type(), "batch_norm_act", [&]<typename scalar_t>() {
    const auto norm = norm_of<acc_t<scalar_t>>(x, mean, var, weight, bias, eps, activation);
    launch_forward<scalar_t>(scope.device, shape, norm, const_data<scalar_t>(x), mutable_data<scalar_t>(y));
  });
  return y;
}

// (y, mean, var); moves the running statistics where there are any.
template <class Device>
std::tuple<Tensor, Tensor, Tensor> train(const Tensor& x, const std::optional<Tensor>& running_mean,
                                         const std::optional<Tensor>& running_var, double momentum, const std::optional<Tensor>& weight,
                                         const std::optional<Tensor>& bias, double eps, int64_t activation, bool channels_last) {
  const DeviceScope<Device> scope(x);
  const Shape shape = checked_shape(x, channels_last);
  Tensor y = allocate_output(x, channels_last), mean = allocate_channels(x), var = allocate_channels(x);
  if (x.numel() == 0) return {y, torch::stable::zero_(mean), torch::stable::zero_(var)};
  STD_TORCH_CHECK(running_mean.has_value() == running_var.has_value(), "batch_norm_act: running statistics come both or not at all");
  if (running_mean) check_channels(*running_mean, x);
  if (running_var) check_channels(*running_var, x);
  Tensor partials = allocate_partials(scope.device, x, shape);
  dispatch_floating(x.scalar_type(), "batch_norm_act_train", [&]<typename scalar_t>() {
    using A = acc_t<scalar_t>;
    const Statistics<A> statistics{mutable_data<A>(mean), mutable_data<A>(var), running_mean ? mutable_data<A>(*running_mean) : nullptr,
                                   running_var ? mutable_data<A>(*running_var) : nullptr, A(momentum)};
    launch_train<scalar_t>(scope.device, shape, norm_of<A>(x, mean, var, weight, bias, eps, activation), const_data<scalar_t>(x),
                           mutable_data<A>(partials), statistics, mutable_data<scalar_t>(y));
  });
  return {y, mean, var};
}

// [2, c]: grad_bias, grad_weight
template <class Device>
Tensor sums(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& var, const std::optional<Tensor>& weight,
            const std::optional<Tensor>& bias, double eps, int64_t activation, bool channels_last) {
  const DeviceScope<Device> scope(x);
  const Shape shape = checked_shape(x, channels_last);
  check_gradient(grad, x, channels_last);
  Tensor result = allocate(x, {2, shape.c}, acc_dtype(x.scalar_type()));
  if (x.numel() == 0) return torch::stable::zero_(result);
  Tensor partials = allocate_partials(scope.device, x, shape);
  dispatch_floating(x.scalar_type(), "batch_norm_act_sums", [&]<typename scalar_t>() {
    using A = acc_t<scalar_t>;
    launch_sums<scalar_t>(scope.device, shape, norm_of<A>(x, mean, var, weight, bias, eps, activation),
                          {const_data<scalar_t>(grad), const_data<scalar_t>(x), mutable_data<A>(partials), mutable_data<A>(result)});
  });
  return result;
}

template <class Device>
Tensor grad_input(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& var, const std::optional<Tensor>& mean_sums,
                  const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps, int64_t activation,
                  bool channels_last) {
  const DeviceScope<Device> scope(x);
  const Shape shape = checked_shape(x, channels_last);
  check_gradient(grad, x, channels_last);
  if (mean_sums) check_channels(*mean_sums, x, 2);
  Tensor grad_x = allocate_output(x, channels_last);
  if (x.numel() == 0) return grad_x;
  dispatch_floating(x.scalar_type(), "batch_norm_act_grad_input", [&]<typename scalar_t>() {
    using A = acc_t<scalar_t>;
    launch_grad_input<scalar_t>(scope.device, shape, norm_of<A>(x, mean, var, weight, bias, eps, activation), const_data<scalar_t>(grad),
                                const_data<scalar_t>(x), const_data<A>(mean_sums), 1.0, mutable_data<scalar_t>(grad_x));
  });
  return grad_x;
}

// (grad_x, sums)
template <class Device>
std::tuple<Tensor, Tensor> train_backward(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& var,
                                          const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps,
                                          int64_t activation, bool channels_last) {
  const DeviceScope<Device> scope(x);
  const Shape shape = checked_shape(x, channels_last);
  check_gradient(grad, x, channels_last);
  Tensor grad_x = allocate_output(x, channels_last), sums = allocate(x, {2, shape.c}, acc_dtype(x.scalar_type()));
  if (x.numel() == 0) return {grad_x, torch::stable::zero_(sums)};
  Tensor partials = allocate_partials(scope.device, x, shape);
  dispatch_floating(x.scalar_type(), "batch_norm_act_train_backward", [&]<typename scalar_t>() {
    using A = acc_t<scalar_t>;
    launch_train_backward<scalar_t>(scope.device, shape, norm_of<A>(x, mean, var, weight, bias, eps, activation),
                                    {const_data<scalar_t>(grad), const_data<scalar_t>(x), mutable_data<A>(partials), mutable_data<A>(sums)},
                                    mutable_data<scalar_t>(grad_x));
  });
  return {grad_x, sums};
}

template <class Device>
void register_ops(torch::stable::detail::StableLibrary& m) {
  implement<"batch_norm_stats", stats<Device>>(m);
  implement<"batch_norm_act", forward<Device>>(m);
  implement<"batch_norm_act_train", train<Device>>(m);
  implement<"batch_norm_act_sums", sums<Device>>(m);
  implement<"batch_norm_act_grad_input", grad_input<Device>>(m);
  implement<"batch_norm_act_train_backward", train_backward<Device>>(m);
}
}  // namespace
}  // namespace ef::batch_norm_act

EF_REGISTER(ef::batch_norm_act::register_ops)
