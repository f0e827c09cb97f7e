// Tensor boundary of squeeze-and-excite: check, allocate, dispatch the dtype once, register.
#include "squeeze_excite.h"

#include <array>

#include "../common/tensor.h"

namespace ef::squeeze_excite {
namespace {
// Whether the elements lie one after the other in the order of the layout; the stride of a dimension of size 1 does not matter.
bool is_dense(const Tensor& x, bool channels_last) {
  int64_t expected = 1;
  for (const int axis : channels_last ? std::array{1, 3, 2, 0} : std::array{3, 2, 1, 0}) {
    if (x.size(axis) != 1 && x.stride(axis) != expected) return false;
    expected *= x.size(axis);
  }
  return true;
}

// Guards behind the checks in Python: nothing below may read or write outside the tensors.
Shape checked_shape(const Tensor& x, bool channels_last) {
  STD_TORCH_CHECK(x.dim() == 4 && (x.numel() == 0 || is_dense(x, channels_last)), "squeeze_excite: x must be dense [n, c, h, w]");
  const int64_t n = x.size(0), c = x.size(1), pixels = x.size(2) * x.size(3);
  return channels_last || pixels == 1 ? Shape{n, pixels, c} : Shape{n * c, pixels, 1};
}
void check_like(const Tensor& grad, const Tensor& x, bool channels_last) {
  bool fits = grad.dim() == 4 && grad.scalar_type() == x.scalar_type() && (grad.numel() == 0 || is_dense(grad, channels_last));
  for (int axis = 0; axis < 4 && fits; ++axis) fits = grad.size(axis) == x.size(axis);
  STD_TORCH_CHECK(fits, "squeeze_excite: grad must be dense and like x");
}
void check_gates(const Tensor& values, const Tensor& x) {
  STD_TORCH_CHECK(values.numel() == x.size(0) * x.size(1) && values.is_contiguous() && values.scalar_type() == acc_dtype(x.scalar_type()),
                  "squeeze_excite: gate and grad_mean must be dense [n, c], in the dtype of the arithmetic");
}

// [n, c]
template <class Device>
Tensor reduce(const Tensor& x, const std::optional<Tensor>& grad, const std::optional<Tensor>& gate, bool channels_last) {
  const DeviceScope<Device> scope(x);
  const Shape shape = checked_shape(x, channels_last);
  STD_TORCH_CHECK(grad.has_value() == gate.has_value(), "squeeze_excite: grad and gate must be given both or neither");
  if (grad) {
    check_like(*grad, x, channels_last);
    check_gates(*gate, x);
  }
  Tensor result = allocate(x, {x.size(0), x.size(1)}, acc_dtype(x.scalar_type()));
  if (x.numel() == 0) return torch::stable::zero_(result);
  const Tensor partials = allocate(x, {shape.rows, part_count(scope.device, shape), shape.channels}, acc_dtype(x.scalar_type()));
  dispatch_floating(x.scalar_type(), "squeeze_excite_reduce", [&]<typename scalar_t>() {
    using A = acc_t<scalar_t>;
    launch_reduce<scalar_t>(
        scope.device, shape,
        {const_data<scalar_t>(x), const_data<scalar_t>(grad), const_data<A>(gate), mutable_data<A>(partials), mutable_data<A>(result)});
  });
  return result;
}

template <class Device>
Tensor scale(const Tensor& x, const Tensor& gate, const std::optional<Tensor>& grad_mean, bool channels_last) {
  const DeviceScope<Device> scope(x);
  const Shape shape = checked_shape(x, channels_last);
  check_gates(gate, x);
  if (grad_mean) check_gates(*grad_mean, x);
  const MemoryFormat format = channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  Tensor y = allocate(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type(), format);
  if (x.numel() == 0) return y;
  dispatch_floating(x.scalar_type(), "squeeze_excite_scale", [&]<typename scalar_t>() {
    using A = acc_t<scalar_t>;
    launch_scale<scalar_t>(scope.device, shape, const_data<scalar_t>(x), const_data<A>(gate), const_data<A>(grad_mean),
                           mutable_data<scalar_t>(y));
  });
  return y;
}

template <class Device>
void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("squeeze_excite_reduce", TORCH_BOX(&reduce<Device>));
  m.impl("squeeze_excite_scale", TORCH_BOX(&scale<Device>));
}
}  // namespace
}  // namespace ef::squeeze_excite

EF_REGISTER(ef::squeeze_excite::register_ops)
