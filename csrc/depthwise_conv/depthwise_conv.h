// What the Tensor boundary may call; raw pointers only. x, y and their gradients are dense, all in one layout: [n, c, h, w], or
// [n, h, w, c] (channels_last); filters are [c, kernel, kernel]. `a` stands for the prologue applied to x; it is zero outside the image.
//   y[oy, ox] = bias + sum over (ky, kx) of weight[ky, kx] a[oy stride - top + ky, ox stride - left + kx]
#pragma once
#include <cstdint>

#include "../common/activation.h"
#include "../common/platform.h"

namespace ef::depthwise_conv {
struct Shape {
  int64_t n, c, h, w, oh, ow;
  int64_t left, top;   // zeros before the first column and the first row
  int kernel, stride;  // 3 or 5; 1 or 2
  Activation prologue;
  bool channels_last;
};

template <typename scalar_t>
void launch_forward(Cpu, const Shape& shape, const scalar_t* x, const scalar_t* weight, const scalar_t* bias, scalar_t* y);
template <typename scalar_t>
void launch_forward(Cuda, const Shape& shape, const scalar_t* x, const scalar_t* weight, const scalar_t* bias, scalar_t* y);

template <typename scalar_t>
void launch_grad_input(Cpu, const Shape& shape, const scalar_t* grad, const scalar_t* x, const scalar_t* weight, scalar_t* grad_x);
template <typename scalar_t>
void launch_grad_input(Cuda, const Shape& shape, const scalar_t* grad, const scalar_t* x, const scalar_t* weight, scalar_t* grad_x);

// partials: [chunk_count(shape)][kernel * kernel + 1][c], added over the chunks in order; the last row is the bias's. The number of
// chunks depends on the shape only. grad_bias [c] may be null.
template <typename scalar_t>
void launch_grad_weight(Cpu, const Shape& shape, const scalar_t* grad, const scalar_t* x, acc_t<scalar_t>* partials, scalar_t* grad_weight,
                        scalar_t* grad_bias);
template <typename scalar_t>
void launch_grad_weight(Cuda, const Shape& shape, const scalar_t* grad, const scalar_t* x, acc_t<scalar_t>* partials, scalar_t* grad_weight,
                        scalar_t* grad_bias);
int64_t chunk_count(Cpu, const Shape& shape);
int64_t chunk_count(Cuda, const Shape& shape);
}  // namespace ef::depthwise_conv
