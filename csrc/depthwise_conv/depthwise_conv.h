// What the Tensor boundary may call; raw pointers only. A call convolves one or several maps ("levels", as of a pyramid) with one filter.
// x, y and their gradients are dense, all in one layout: [n, c, h, w], or [n, h, w, c] (channels_last); filters are
// [c, kernel, kernel]. `a` stands for the prologue applied to x; it is zero outside the image.
//   y[oy, ox] = bias + sum over (ky, kx) of weight[ky, kx] a[oy stride - top + ky, ox stride - left + kx]
#pragma once
#include <cstdint>

#include "../common/math.h"
#include "../common/platform.h"

namespace ef::depthwise_conv {
struct Shape {
  int64_t n, c, h, w, oh, ow;
  int64_t left, top;   // zeros before the first column and the first row
  int kernel, stride;  // 3 or 5; 1 or 2
  Activation prologue;
  bool channels_last;
};

// One map, with what is read and written for it.
template <typename scalar_t>
struct Level {
  Shape shape;
  const scalar_t* x;     // [n, c, h, w]
  const scalar_t* grad;  // [n, c, oh, ow]; null in the forward
  scalar_t* result;      // y or the gradient of x; null for the gradient of the filter
};

// A filter or a bias: of the dtype of the maps or, as autocast leaves it, of that of the arithmetic (`full`). Its values are used rounded
// to the dtype of the maps in any case.
template <typename scalar_t>
struct Parameter {
  const void* data;  // or null
  bool full;
  EF_HD acc_t<scalar_t> operator[](int64_t i) const {
    using A = acc_t<scalar_t>;
    return A(full ? scalar_t(static_cast<const A*>(data)[i]) : static_cast<const scalar_t*>(data)[i]);
  }
};
// Its gradient, of its dtype, and rounded to that alone.
template <typename scalar_t>
struct ParameterGradient {
  void* data;  // or null
  bool full;
  EF_HD void set(int64_t i, acc_t<scalar_t> value) const {
    if (full) {
      static_cast<acc_t<scalar_t>*>(data)[i] = value;
    } else {
      static_cast<scalar_t*>(data)[i] = scalar_t(value);
    }
  }
};

// The maps of a call, each with at least one element. All but n, sizes and padding is the same for all.
template <typename scalar_t>
struct Levels {
  int count;
  Level<scalar_t> level[kMaxLevels];
  void add(const Level<scalar_t>& next) { level[count++] = next; }
};

template <typename scalar_t>
void launch_forward(Cpu, const Levels<scalar_t>& levels, Parameter<scalar_t> weight, Parameter<scalar_t> bias);
template <typename scalar_t>
void launch_forward(Cuda, const Levels<scalar_t>& levels, Parameter<scalar_t> weight, Parameter<scalar_t> bias);

template <typename scalar_t>
void launch_grad_input(Cpu, const Levels<scalar_t>& levels, Parameter<scalar_t> weight);
template <typename scalar_t>
void launch_grad_input(Cuda, const Levels<scalar_t>& levels, Parameter<scalar_t> weight);

// partials: [chunks][kernel * kernel + 1][c], added over the chunks in order; the last row is the bias's. The chunks are those of the
// first level, then of the next; their number depends on the shapes only. grad_bias [c] may be null.
template <typename scalar_t>
void launch_grad_weight(Cpu, const Levels<scalar_t>& levels, acc_t<scalar_t>* partials, ParameterGradient<scalar_t> grad_weight,
                        ParameterGradient<scalar_t> grad_bias);
template <typename scalar_t>
void launch_grad_weight(Cuda, const Levels<scalar_t>& levels, acc_t<scalar_t>* partials, ParameterGradient<scalar_t> grad_weight,
                        ParameterGradient<scalar_t> grad_bias);
int64_t chunk_count(Cpu, const Shape& shape);  // of one level
int64_t chunk_count(Cuda, const Shape& shape);
}  // namespace ef::depthwise_conv
