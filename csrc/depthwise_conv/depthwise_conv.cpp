// Tensor boundary of the depthwise convolution: check, allocate, dispatch the dtype once, register.
#include "depthwise_conv.h"

#include <span>
#include <tuple>

#include "../common/tensor.h"

namespace ef::depthwise_conv {
namespace {
using Tensors = std::vector<Tensor>;
using Numbers = std::vector<int64_t>;

// A guard behind the checks in Python: nothing below may read or write outside the tensors.
Shape checked_shape(const Tensor& x, int64_t kernel, int64_t stride, int64_t left, int64_t top, int64_t out_height, int64_t out_width,
                    int64_t prologue, bool channels_last) {
  STD_TORCH_CHECK(is_dense(x, channels_last), "depthwise_conv: x must be dense [n, c, h, w]");
  STD_TORCH_CHECK((kernel == 3 || kernel == 5) && (stride == 1 || stride == 2), "depthwise_conv: no kernel for this filter or stride");
  for (const int64_t number : {left, top, out_height, out_width})
    STD_TORCH_CHECK(number >= 0 && number < int64_t(1) << 31, "depthwise_conv: padding and sizes must be in [0, 2^31), got ", number);
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
          activation_of(prologue, "depthwise_conv"),
          channels_last};
}

void check_like_output(const Tensor& grad, const Tensor& x, const Shape& s) {
  STD_TORCH_CHECK(grad.size(0) == s.n && grad.size(1) == s.c && grad.scalar_type() == x.scalar_type() && is_dense(grad, s.channels_last),
                  "depthwise_conv: grad must be dense and like the output");
}

bool fits_dtype(const Tensor& parameter, ScalarType dtype) {
  return parameter.scalar_type() == dtype || parameter.scalar_type() == acc_dtype(dtype);
}
void check_filter(const Tensor& weight, const Tensor& x) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == x.size(1) && weight.size(1) == 1 && weight.size(2) == weight.size(3) &&
                      weight.is_contiguous() && fits_dtype(weight, x.scalar_type()),
                  "depthwise_conv: weight must be dense [c, 1, k, k], of the dtype of the maps or of the arithmetic");
}
template <typename scalar_t>
Parameter<scalar_t> parameter_of(const std::optional<Tensor>& values, ScalarType dtype) {
  if (!values) return {nullptr, false};
  return {values->const_data_ptr(), values->scalar_type() != dtype};
}

void check_maps(std::span<const Tensor> maps) {
  for (const Tensor& map : maps) STD_TORCH_CHECK(map.dim() == 4, "depthwise_conv: maps and their gradients must be [n, c, h, w]");
}

// As many numbers as maps, for each of the lists.
template <class... Lists>
void check_counts(std::span<const Tensor> xs, const Lists&... lists) {
  STD_TORCH_CHECK(!xs.empty() && xs.size() <= kMaxLevels && ((lists.size() == xs.size()) && ...), "depthwise_conv: 1 to ", kMaxLevels,
                  " maps, and for each its numbers");
  check_maps(xs);
}

// A map without elements has no memory. Kernels read nothing of it, but they move its pointer, and a null pointer must stay.
template <typename scalar_t>
const scalar_t* start_of(const Tensor& map, const Tensor& other) {
  return const_data<scalar_t>(map.numel() > 0 ? map : other);
}

template <class Device>
Tensors forward(std::span<const Tensor> xs, const Tensor& weight, const std::optional<Tensor>& bias, int64_t stride,
                std::span<const int64_t> left, std::span<const int64_t> top, std::span<const int64_t> out_height,
                std::span<const int64_t> out_width, int64_t prologue, bool channels_last) {
  check_counts(xs, left, top, out_height, out_width);
  const DeviceScope<Device> scope(xs[0]);
  const ScalarType dtype = xs[0].scalar_type();
  STD_TORCH_CHECK(!bias.has_value() || (bias->numel() == weight.size(0) && bias->is_contiguous() && fits_dtype(*bias, dtype)),
                  "depthwise_conv: bias must be dense [c], of the dtype of the maps or of the arithmetic");
  Tensors ys;
  dispatch_floating(dtype, "depthwise_conv", [&]<typename scalar_t>() {
    Levels<scalar_t> levels{};
    for (size_t i = 0; i < xs.size(); ++i) {
      check_filter(weight, xs[i]);
      STD_TORCH_CHECK(xs[i].scalar_type() == dtype, "depthwise_conv: maps must have the same dtype");
      const Shape s = checked_shape(xs[i], weight.size(2), stride, left[i], top[i], out_height[i], out_width[i], prologue, channels_last);
      ys.push_back(allocate(xs[i], {s.n, s.c, s.oh, s.ow}, dtype, channels_last));
      if (ys[i].numel() > 0) levels.add({s, start_of<scalar_t>(xs[i], ys[i]), nullptr, mutable_data<scalar_t>(ys[i])});
    }
    if (levels.count > 0)
      launch_forward<scalar_t>(scope.device, levels, parameter_of<scalar_t>(weight, dtype), parameter_of<scalar_t>(bias, dtype));
  });
  return ys;
}

template <class Device>
Tensors grad_input(std::span<const Tensor> grads, std::span<const Tensor> xs, const Tensor& weight, int64_t stride,
                   std::span<const int64_t> left, std::span<const int64_t> top, int64_t prologue, bool channels_last) {
  check_counts(xs, grads, left, top);
  check_maps(grads);
  const DeviceScope<Device> scope(xs[0]);
  const ScalarType dtype = xs[0].scalar_type();
  Tensors grad_xs;
  dispatch_floating(dtype, "depthwise_conv_grad_input", [&]<typename scalar_t>() {
    Levels<scalar_t> levels{};
    for (size_t i = 0; i < xs.size(); ++i) {
      const Tensor &x = xs[i], &grad = grads[i];
      check_filter(weight, x);
      STD_TORCH_CHECK(x.scalar_type() == dtype, "depthwise_conv: maps must have the same dtype");
      const Shape s = checked_shape(x, weight.size(2), stride, left[i], top[i], grad.size(2), grad.size(3), prologue, channels_last);
      check_like_output(grad, x, s);
      grad_xs.push_back(allocate(x, {s.n, s.c, s.h, s.w}, dtype, channels_last));
      if (x.numel() > 0) levels.add({s, const_data<scalar_t>(x), start_of<scalar_t>(grad, x), mutable_data<scalar_t>(grad_xs[i])});
    }
    if (levels.count > 0) launch_grad_input<scalar_t>(scope.device, levels, parameter_of<scalar_t>(weight, dtype));
  });
  return grad_xs;
}

// (grad_weight [c, 1, k, k], grad_bias [c], or [0] where it is not wanted), summed over the maps
template <class Device>
std::tuple<Tensor, Tensor> grad_weight(std::span<const Tensor> grads, std::span<const Tensor> xs, int64_t kernel, int64_t stride,
                                       std::span<const int64_t> left, std::span<const int64_t> top, int64_t prologue, bool channels_last,
                                       bool with_bias, bool in_float32) {
  check_counts(xs, grads, left, top);
  check_maps(grads);
  const DeviceScope<Device> scope(xs[0]);
  const ScalarType dtype = xs[0].scalar_type();
  const int64_t channels = xs[0].size(1);
  const ScalarType of_filter = in_float32 ? acc_dtype(dtype) : dtype;
  Tensor weight = allocate(xs[0], {channels, 1, kernel, kernel}, of_filter);
  Tensor bias = allocate(xs[0], {with_bias ? channels : 0}, of_filter);
  dispatch_floating(dtype, "depthwise_conv_grad_weight", [&]<typename scalar_t>() {
    Levels<scalar_t> levels{};
    int64_t chunks = 0;
    for (size_t i = 0; i < xs.size(); ++i) {
      const Tensor &x = xs[i], &grad = grads[i];
      const Shape s = checked_shape(x, kernel, stride, left[i], top[i], grad.size(2), grad.size(3), prologue, channels_last);
      STD_TORCH_CHECK(s.c == channels && x.scalar_type() == dtype, "depthwise_conv: maps must have the same channels and dtype");
      check_like_output(grad, x, s);
      if (grad.numel() == 0 || x.numel() == 0) continue;
      levels.add({s, const_data<scalar_t>(x), const_data<scalar_t>(grad), nullptr});
      chunks += chunk_count(scope.device, s);
    }
    if (levels.count == 0) {
      torch::stable::zero_(weight), torch::stable::zero_(bias);
      return;
    }
    Tensor partials = allocate(xs[0], {chunks, kernel * kernel + 1, channels}, acc_dtype(dtype));
    const bool full = of_filter != dtype;
    launch_grad_weight<scalar_t>(scope.device, levels, mutable_data<acc_t<scalar_t>>(partials), {weight.mutable_data_ptr(), full},
                                 {with_bias ? bias.mutable_data_ptr() : nullptr, full});
  });
  return {weight, bias};
}

// The ops as their schemas have them: of one map, and of several.
template <typename T>
std::span<const T> one(const T& value) {
  return {&value, 1};
}

template <class Device>
Tensor forward_one(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t stride, int64_t left, int64_t top,
                   int64_t out_height, int64_t out_width, int64_t prologue, bool channels_last) {
  return forward<Device>(one(x), weight, bias, stride, one(left), one(top), one(out_height), one(out_width), prologue, channels_last)[0];
}
template <class Device>
Tensors forward_levels(const Tensors& xs, const Tensor& weight, const std::optional<Tensor>& bias, int64_t stride, const Numbers& left,
                       const Numbers& top, const Numbers& out_height, const Numbers& out_width, int64_t prologue, bool channels_last) {
  return forward<Device>(xs, weight, bias, stride, left, top, out_height, out_width, prologue, channels_last);
}

template <class Device>
Tensor grad_input_one(const Tensor& grad, const Tensor& x, const Tensor& weight, int64_t stride, int64_t left, int64_t top,
                      int64_t prologue, bool channels_last) {
  return grad_input<Device>(one(grad), one(x), weight, stride, one(left), one(top), prologue, channels_last)[0];
}
template <class Device>
Tensors grad_input_levels(const Tensors& grads, const Tensors& xs, const Tensor& weight, int64_t stride, const Numbers& left,
                          const Numbers& top, int64_t prologue, bool channels_last) {
  return grad_input<Device>(grads, xs, weight, stride, left, top, prologue, channels_last);
}

template <class Device>
std::tuple<Tensor, Tensor> grad_weight_one(const Tensor& grad, const Tensor& x, int64_t kernel, int64_t stride, int64_t left, int64_t top,
                                           int64_t prologue, bool channels_last, bool with_bias, bool in_float32) {
  return grad_weight<Device>(one(grad), one(x), kernel, stride, one(left), one(top), prologue, channels_last, with_bias, in_float32);
}
template <class Device>
std::tuple<Tensor, Tensor> grad_weight_levels(const Tensors& grads, const Tensors& xs, int64_t kernel, int64_t stride, const Numbers& left,
                                              const Numbers& top, int64_t prologue, bool channels_last, bool with_bias, bool in_float32) {
  return grad_weight<Device>(grads, xs, kernel, stride, left, top, prologue, channels_last, with_bias, in_float32);
}

template <class Device>
void register_ops(torch::stable::detail::StableLibrary& m) {
  implement<"depthwise_conv", forward_one<Device>>(m);
  implement<"depthwise_conv_levels", forward_levels<Device>>(m);
  implement<"depthwise_conv_grad_input", grad_input_one<Device>>(m);
  implement<"depthwise_conv_levels_grad_input", grad_input_levels<Device>>(m);
  implement<"depthwise_conv_grad_weight", grad_weight_one<Device>>(m);
  implement<"depthwise_conv_levels_grad_weight", grad_weight_levels<Device>>(m);
}
}  // namespace
}  // namespace ef::depthwise_conv

EF_REGISTER(ef::depthwise_conv::register_ops)
