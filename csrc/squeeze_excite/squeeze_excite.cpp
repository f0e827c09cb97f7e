// Tensor boundary of squeeze-and-excite: check, allocate, dispatch the dtype once, register.
#include "squeeze_excite.h"

#include "../common/tensor.h"

namespace ef::squeeze_excite {
namespace {
// Guards behind the checks in Python: nothing below may read or write outside the tensors.
Shape checked_shape(const Tensor& x, bool channels_last) {
  STD_TORCH_CHECK(x.dim() == 4 && is_dense(x, channels_last), "squeeze_excite: x must be dense [n, c, h, w]");
  const int64_t n = x.size(0), c = x.size(1), pixels = x.size(2) * x.size(3);
  return channels_last || pixels == 1 ? Shape{n, pixels, c} : Shape{n * c, pixels, 1};
}
void check_like(const Tensor& grad, const Tensor& x, bool channels_last) {
  STD_TORCH_CHECK(is_dense_like(grad, x, channels_last), "squeeze_excite: grad must be dense and like x");
}
void check_dense(const std::optional<Tensor>& values, int64_t count, const Tensor& x, const char* name) {
  if (!values) return;
  STD_TORCH_CHECK(values->numel() == count && values->is_contiguous() && values->scalar_type() == acc_dtype(x.scalar_type()),
                  "squeeze_excite: ", name, " must be dense, of ", count, " elements, in the dtype of the arithmetic");
}
int64_t checked_squeezed(const Tensor& x, const Tensor& reduce, const Tensor& expand) {
  const int64_t channels = x.size(1), squeezed = reduce.dim() ? reduce.size(0) : 0;
  STD_TORCH_CHECK(squeezed > 0, "squeeze_excite: reduce_weight must have at least one row");
  check_dense(reduce, squeezed * channels, x, "reduce_weight");
  check_dense(expand, channels * squeezed, x, "expand_weight");
  return squeezed;
}

// What `kept` holds: mean, gate, reduced and squeezed of all images, one after the other.
int64_t kept_size(int64_t images, int64_t channels, int64_t squeezed) { return 2 * images * (channels + squeezed); }
template <typename A>
Gates<A> gates_in(const Tensor& kept, int64_t images, int64_t channels, int64_t squeezed) {
  A *mean = mutable_data<A>(kept), *gate = mean + images * channels, *reduced = gate + images * channels;
  return {images, mean, gate, reduced, reduced + images * squeezed};
}

// y, and what the backward needs of the way to it.
template <class Device>
std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& reduce, const std::optional<Tensor>& reduce_bias, const Tensor& expand,
                                   const std::optional<Tensor>& expand_bias, int64_t activation, bool channels_last) {
  const DeviceScope<Device> scope(x);
  const Shape shape = checked_shape(x, channels_last);
  const int64_t images = x.size(0), channels = x.size(1), squeezed = checked_squeezed(x, reduce, expand);
  check_dense(reduce_bias, squeezed, x, "reduce_bias");
  check_dense(expand_bias, channels, x, "expand_bias");
  const ScalarType acc = acc_dtype(x.scalar_type());
  Tensor kept = allocate(x, {kept_size(images, channels, squeezed)}, acc);
  Tensor y = allocate(x, {images, channels, x.size(2), x.size(3)}, x.scalar_type(), channels_last);
  if (x.numel() == 0) return {y, torch::stable::zero_(kept)};
  const Tensor partials = allocate(x, {shape.rows, chunk_count(scope.device, shape), shape.channels}, acc);
  dispatch_floating(x.scalar_type(), "squeeze_excite", [&]<typename scalar_t>() {
    using A = acc_t<scalar_t>;
    const Gates<A> gates = gates_in<A>(kept, images, channels, squeezed);
    launch_reduce<scalar_t>(scope.device, shape, {const_data<scalar_t>(x), nullptr, nullptr, mutable_data<A>(partials), gates.mean});
    launch_gates<A>(
        scope.device,
        {channels, squeezed, const_data<A>(reduce), const_data<A>(reduce_bias), const_data<A>(expand), const_data<A>(expand_bias)},
        activation_of(activation, "squeeze_excite"), gates);
    launch_scale<scalar_t>(scope.device, shape, const_data<scalar_t>(x), gates.gate, nullptr, mutable_data<scalar_t>(y));
  });
  return {y, kept};
}

// Of x, reduce_weight, reduce_bias, expand_weight and expand_bias, those that `needs` asks for, in this order.
template <class Device>
std::vector<Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& reduce, const Tensor& expand, const Tensor& kept,
                             int64_t activation, bool channels_last, const std::vector<bool>& needs) {
  const DeviceScope<Device> scope(x);
  const Shape shape = checked_shape(x, channels_last);
  check_like(grad, x, channels_last);
  const int64_t images = x.size(0), channels = x.size(1), squeezed = checked_squeezed(x, reduce, expand);
  check_dense(kept, kept_size(images, channels, squeezed), x, "kept");
  STD_TORCH_CHECK(needs.size() == 5, "squeeze_excite: needs must say of five gradients whether they are needed, got ", needs.size());
  const ScalarType acc = acc_dtype(x.scalar_type());
  std::vector<Tensor> results;
  std::optional<Tensor> wanted[5];
  for (size_t i = 0; i < 5; ++i) {
    if (!needs[i]) continue;
    wanted[i] = i == 0       ? allocate_like(x)
                : i % 2 == 0 ? allocate(x, {i == 2 ? squeezed : channels}, acc)
                             : allocate_like(i == 1 ? reduce : expand);
    results.push_back(x.numel() == 0 ? torch::stable::zero_(*wanted[i]) : *wanted[i]);
  }
  if (x.numel() == 0) return results;
  const int64_t gate_count = images * channels;
  const Tensor partials = allocate(x, {shape.rows, chunk_count(scope.device, shape), shape.channels}, acc);
  const Tensor small = allocate(x, {2 * gate_count + images * squeezed}, acc);  // gradients of gates, means and reduced
  dispatch_floating(x.scalar_type(), "squeeze_excite_backward", [&]<typename scalar_t>() {
    using A = acc_t<scalar_t>;
    const auto gradient = [&](int i) { return wanted[i] ? mutable_data<A>(*wanted[i]) : nullptr; };
    const Gates<A> gates = gates_in<A>(kept, images, channels, squeezed);
    A *grad_gate = mutable_data<A>(small), *grad_mean = needs[0] ? grad_gate + gate_count : nullptr;
    launch_reduce<scalar_t>(scope.device, shape,
                            {const_data<scalar_t>(x), const_data<scalar_t>(grad), gates.gate, mutable_data<A>(partials), grad_gate});
    launch_gates_backward<A>(scope.device, {channels, squeezed, const_data<A>(reduce), nullptr, const_data<A>(expand), nullptr},
                             activation_of(activation, "squeeze_excite"), gates,
                             {grad_gate, needs[0] || needs[1] || needs[2] ? grad_gate + 2 * gate_count : nullptr, grad_mean, gradient(1),
                              gradient(3), gradient(2), gradient(4)});
    if (needs[0])
      launch_scale<scalar_t>(scope.device, shape, const_data<scalar_t>(grad), gates.gate, grad_mean, mutable_data<scalar_t>(*wanted[0]));
  });
  return results;
}

template <class Device>
void register_ops(torch::stable::detail::StableLibrary& m) {
  implement<"squeeze_excite", forward<Device>>(m);
  implement<"squeeze_excite_backward", backward<Device>>(m);
}
}  // namespace
}  // namespace ef::squeeze_excite

EF_REGISTER(ef::squeeze_excite::register_ops)
