// What the Tensor boundary may call; raw pointers only. x, y and their gradients are dense [n, c, inner]: NCHW with inner = h * w, or
// channels_last as n = pixels of one value per channel. What belongs to a channel is acc_t [c].
#pragma once
#include <cstdint>

#include "../common/math.h"
#include "../common/platform.h"
#include "batch_norm_act_math.h"

namespace ef::batch_norm_act {
struct Shape {
  int64_t n, c, inner;
  EF_HD int64_t values() const { return n * inner; }  // per channel
};

template <typename A>
struct Norm {
  const A* mean;
  const A* var;     // biased
  const A* weight;  // or null
  const A* bias;    // or null
  A eps;
  Activation activation;

  EF_HD Channel<A> channel(int64_t c) const {
    const A scale = inverse_deviation(var[c], eps);
    return {mean[c], weight ? weight[c] * scale : scale, bias ? bias[c] : A(0)};
  }
  // From the sums [2, c] times `factor`; null where mean and var are constants.
  EF_HD GradChannel<A> grad_channel(const A* sums, A factor, int64_t channels, int64_t c) const {
    if (!sums) return {A(0), A(0)};
    const A inverse = inverse_deviation(var[c], eps), scale = weight ? weight[c] * inverse : inverse;
    return grad_channel_of(scale, inverse, sums[c], sums[channels + c], factor);
  }
};

// Where the statistics of a batch go. The running ones, moved towards them by `momentum`, may be null.
template <typename A>
struct Statistics {
  A* mean;
  A* var;
  A* running_mean;
  A* running_var;
  A momentum;

  EF_HD void set(int64_t c, A batch_mean, A batch_var, int64_t values) const {
    mean[c] = batch_mean;
    var[c] = batch_var;
    if (!running_mean) return;
    running_mean[c] = moved(running_mean[c], batch_mean, momentum);
    running_var[c] = moved(running_var[c], unbiased(batch_var, values), momentum);
  }
};

// Sums of chunks of a fixed size go through partials [partial_count(shape), 3, c], and are added in their order, in double: the number
// and size of the chunks depend on the shape only.
int64_t partial_count(Cpu, const Shape& shape);
int64_t partial_count(Cuda, const Shape& shape);

template <typename scalar_t>
void launch_stats(Cpu, const Shape& shape, const scalar_t* x, acc_t<scalar_t>* partials, const Statistics<acc_t<scalar_t>>& statistics);
template <typename scalar_t>
void launch_stats(Cuda, const Shape& shape, const scalar_t* x, acc_t<scalar_t>* partials, const Statistics<acc_t<scalar_t>>& statistics);

template <typename scalar_t>
void launch_forward(Cpu, const Shape& shape, const Norm<acc_t<scalar_t>>& norm, const scalar_t* x, scalar_t* y);
template <typename scalar_t>
void launch_forward(Cuda, const Shape& shape, const Norm<acc_t<scalar_t>>& norm, const scalar_t* x, scalar_t* y);

// Both; `norm` points to the mean and var of `statistics`.
template <typename scalar_t>
void launch_train(Cpu, const Shape& shape, const Norm<acc_t<scalar_t>>& norm, const scalar_t* x, acc_t<scalar_t>* partials,
                  const Statistics<acc_t<scalar_t>>& statistics, scalar_t* y);
template <typename scalar_t>
void launch_train(Cuda, const Shape& shape, const Norm<acc_t<scalar_t>>& norm, const scalar_t* x, acc_t<scalar_t>* partials,
                  const Statistics<acc_t<scalar_t>>& statistics, scalar_t* y);

template <typename scalar_t>
struct Gradients {
  const scalar_t* grad;
  const scalar_t* x;
  acc_t<scalar_t>* partials;
  acc_t<scalar_t>* sums;  // [2, c]: grad_bias, grad_weight
};

template <typename scalar_t>
void launch_sums(Cpu, const Shape& shape, const Norm<acc_t<scalar_t>>& norm, const Gradients<scalar_t>& in);
template <typename scalar_t>
void launch_sums(Cuda, const Shape& shape, const Norm<acc_t<scalar_t>>& norm, const Gradients<scalar_t>& in);

// sums: null where mean and var are constants, else the sums over all values, which `factor` divides by their number.
template <typename scalar_t>
void launch_grad_input(Cpu, const Shape& shape, const Norm<acc_t<scalar_t>>& norm, const scalar_t* grad, const scalar_t* x,
                       const acc_t<scalar_t>* sums, double factor, scalar_t* grad_x);
template <typename scalar_t>
void launch_grad_input(Cuda, const Shape& shape, const Norm<acc_t<scalar_t>>& norm, const scalar_t* grad, const scalar_t* x,
                       const acc_t<scalar_t>* sums, double factor, scalar_t* grad_x);

// Both.
template <typename scalar_t>
void launch_train_backward(Cpu, const Shape& shape, const Norm<acc_t<scalar_t>>& norm, const Gradients<scalar_t>& in, scalar_t* grad_x);
template <typename scalar_t>
void launch_train_backward(Cuda, const Shape& shape, const Norm<acc_t<scalar_t>>& norm, const Gradients<scalar_t>& in, scalar_t* grad_x);
}  // namespace ef::batch_norm_act
