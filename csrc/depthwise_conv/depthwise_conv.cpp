// Tensor boundary of the depthwise convolution: check, allocate, dispatch the dtype once, register.
#include "depthwise_conv.h"

#include <array>
#include <tuple>

#include "../common/tensor.h"

namespace ef::depthwise_conv {
namespace {
MemoryFormat format_of(bool channels_last) { return channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous; }

// Whether the elements lie one after the other in the order of the layout; the stride of a dimension of size 1 does not matter.
bool is_dense(const Tensor& x, bool channels_last) {
  int64_t expected = 1;
  for (const int axis : channels_last ? std::array{1, 3, 2, 0} : std::array{3, 2, 1, 0}) {
    if (x.size(axis) != 1 && x.stride(axis) != expected) return false;
    expected *= x.size(axis);
  }
  return true;
}

// A guard behind the checks in Python: nothing below may read or write outside the tensors.
Shape checked_shape(const Tensor& x, int64_t kernel, int64_t stride, int64_t left, int64_t top, int64_t out_height, int64_t out_width,
                    int64_t prologue, bool channels_last) {
  STD_TORCH_CHECK(x.dim() == 4 && (x.numel() == 0 || is_dense(x, channels_last)), "depthwise_conv: x must be dense [n, c, h, w]");
  STD_TORCH_CHECK((kernel == 3 || kernel == 5) && (stride == 1 || stride == 2), "depthwise_conv: no kernel for this filter or stride");
  STD_TORCH_CHECK(left >= 0 && top >= 0 && out_height >= 0 && out_width >= 0, "depthwise_conv: sizes must not be negative");
  return {x.size(0),
          x.size(1),
          x.size(2),
          x.size(3),
          out_height,
          out_width,
          left,
          top,
          int(kernel),
          int(stride),
          static_cast<Activation>(prologue),
          channels_last};
}

void check_like_output(const Tensor& grad, const Tensor& x, const Shape& s) {
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == s.n && grad.size(1) == s.c && grad.scalar_type() == x.scalar_type() &&
                      (grad.numel() == 0 || is_dense(grad, s.channels_last)),
                  "depthwise_conv: grad must be dense and like the output");
}

void check_filter(const Tensor& weight, const Tensor& x) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == x.size(1) && weight.size(1) == 1 && weight.size(2) == weight.size(3) &&
                      weight.is_contiguous() && weight.scalar_type() == x.scalar_type(),
                  "depthwise_conv: weight must be dense [c, 1, k, k]");
}

template <class Device>
Tensor forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t stride, int64_t left, int64_t top,
               int64_t out_height, int64_t out_width, int64_t prologue, bool channels_last) {
  const DeviceScope<Device> scope(x);
  check_filter(weight, x);
  const Shape shape = checked_shape(x, weight.size(2), stride, left, top, out_height, out_width, prologue, channels_last);
  STD_TORCH_CHECK(!bias.has_value() || (bias->numel() == shape.c && bias->is_contiguous() && bias->scalar_type() == x.scalar_type()),
                  "depthwise_conv: bias must be dense [c]");
  Tensor y = allocate(x, {shape.n, shape.c, shape.oh, shape.ow}, x.scalar_type(), format_of(channels_last));
  if (y.numel() == 0) return y;
  dispatch_floating(x.scalar_type(), "depthwise_conv", [&]<typename scalar_t>() {
    launch_forward<scalar_t>(scope.device, shape, const_data<scalar_t>(x), const_data<scalar_t>(weight), const_data<scalar_t>(bias),
                             mutable_data<scalar_t>(y));
  });
  return y;
}

template <class Device>
Tensor grad_input(const Tensor& grad, const Tensor& x, const Tensor& weight, int64_t stride, int64_t left, int64_t top, int64_t prologue,
                  bool channels_last) {
  const DeviceScope<Device> scope(x);
  check_filter(weight, x);
  const Shape shape = checked_shape(x, weight.size(2), stride, left, top, grad.size(2), grad.size(3), prologue, channels_last);
  check_like_output(grad, x, shape);
  Tensor grad_x = allocate(x, {shape.n, shape.c, shape.h, shape.w}, x.scalar_type(), format_of(channels_last));
  if (x.numel() == 0) return grad_x;
  dispatch_floating(x.scalar_type(), "depthwise_conv_grad_input", [&]<typename scalar_t>() {
    launch_grad_input<scalar_t>(scope.device, shape, const_data<scalar_t>(grad), const_data<scalar_t>(x), const_data<scalar_t>(weight),
                                mutable_data<scalar_t>(grad_x));
  });
  return grad_x;
}

// (grad_weight [c, 1, k, k], grad_bias [c], or [0] where it is not wanted)
template <class Device>
std::tuple<Tensor, Tensor> grad_weight(const Tensor& grad, const Tensor& x, int64_t kernel, int64_t stride, int64_t left, int64_t top,
                                       int64_t prologue, bool channels_last, bool with_bias) {
  const DeviceScope<Device> scope(x);
  const Shape shape = checked_shape(x, kernel, stride, left, top, grad.size(2), grad.size(3), prologue, channels_last);
  check_like_output(grad, x, shape);
  const ScalarType dtype = x.scalar_type();
  Tensor weight = allocate(x, {shape.c, 1, kernel, kernel}, dtype);
  Tensor bias = allocate(x, {with_bias ? shape.c : 0}, dtype);
  if (grad.numel() == 0 || x.numel() == 0) return {torch::stable::zero_(weight), torch::stable::zero_(bias)};
  Tensor partials = allocate(x, {chunk_count(scope.device, shape), kernel * kernel + 1, shape.c}, acc_dtype(dtype));
  dispatch_floating(dtype, "depthwise_conv_grad_weight", [&]<typename scalar_t>() {
    launch_grad_weight<scalar_t>(scope.device, shape, const_data<scalar_t>(grad), const_data<scalar_t>(x),
                                 mutable_data<acc_t<scalar_t>>(partials), mutable_data<scalar_t>(weight),
                                 with_bias ? mutable_data<scalar_t>(bias) : nullptr);
  });
  return {weight, bias};
}

template <class Device>
void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("depthwise_conv", TORCH_BOX(&forward<Device>));
  m.impl("depthwise_conv_grad_input", TORCH_BOX(&grad_input<Device>));
  m.impl("depthwise_conv_grad_weight", TORCH_BOX(&grad_weight<Device>));
}
}  // namespace
}  // namespace ef::depthwise_conv

EF_REGISTER(ef::depthwise_conv::register_ops)
