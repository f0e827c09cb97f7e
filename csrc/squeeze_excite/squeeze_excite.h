// Squeeze-and-excite on raw pointers. x, its gradient and y are dense [rows, pixels, channels]: a row is an image where the memory
// format is channels_last, and a plane, of one channel, in NCHW. What belongs to a channel of an image is acc_t [rows, channels].
#pragma once
#include <cstdint>

#include "../common/math.h"
#include "../common/platform.h"
#include "squeeze_excite_math.h"

namespace ef::squeeze_excite {
struct Shape {
  int64_t rows, pixels, channels;
  EF_HD int64_t row() const { return pixels * channels; }  // elements
  EF_HD int64_t gates() const { return rows * channels; }
};

// Sums of chunks of a fixed size go through partials [rows, chunk_count, channels], and are added in their order, in double: the number
// and size of the chunks depend on the shape only.
int64_t chunk_count(Cpu, const Shape& shape);
int64_t chunk_count(Cuda, const Shape& shape);

template <typename scalar_t>
struct Reduction {
  const scalar_t* x;
  const scalar_t* grad;         // null: means of x
  const acc_t<scalar_t>* gate;  // null with grad
  acc_t<scalar_t>* partials;
  acc_t<scalar_t>* result;  // the means, or grad_gate
};
template <typename scalar_t>
void launch_reduce(Cpu, const Shape& shape, const Reduction<scalar_t>& in);
template <typename scalar_t>
void launch_reduce(Cuda, const Shape& shape, const Reduction<scalar_t>& in);

// y = x sigmoid(gate), or with grad_mean, for x the gradient of y, x sigmoid(gate) + grad_mean / pixels.
template <typename scalar_t>
void launch_scale(Cpu, const Shape& shape, const scalar_t* x, const acc_t<scalar_t>* gate, const acc_t<scalar_t>* grad_mean, scalar_t* y);
template <typename scalar_t>
void launch_scale(Cuda, const Shape& shape, const scalar_t* x, const acc_t<scalar_t>* gate, const acc_t<scalar_t>* grad_mean, scalar_t* y);

// From the means to the gates, before the sigmoid. Dense; biases may be null.
template <typename A>
struct Weights {
  int64_t channels, squeezed;
  const A* reduce;       // [squeezed, channels]
  const A* reduce_bias;  // [squeezed]
  const A* expand;       // [channels, squeezed]
  const A* expand_bias;  // [channels]
};
// What belongs to an image; kept for the backward.
template <typename A>
struct Gates {
  int64_t images;
  A *mean, *gate;         // [images, channels]
  A *reduced, *squeezed;  // [images, squeezed]: before and after the activation
};
template <typename A>
void launch_gates(Cpu, const Weights<A>& weights, Activation activation, const Gates<A>& gates);
template <typename A>
void launch_gates(Cuda, const Weights<A>& weights, Activation activation, const Gates<A>& gates);

// Gradients, null where not wanted.
template <typename A>
struct GateGradients {
  const A* gate;       // [images, channels], given
  A* reduced;          // [images, squeezed], working memory
  A* mean;             // [images, channels]
  A *reduce, *expand;  // as the weights
  A *reduce_bias, *expand_bias;
};
template <typename A>
void launch_gates_backward(Cpu, const Weights<A>& weights, Activation activation, const Gates<A>& gates, const GateGradients<A>& grad);
template <typename A>
void launch_gates_backward(Cuda, const Weights<A>& weights, Activation activation, const Gates<A>& gates, const GateGradients<A>& grad);
}  // namespace ef::squeeze_excite
