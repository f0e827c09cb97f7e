// Batch normalization of one value, then an activation, and the gradient:
//   z = (x - mean) scale + bias,  scale = weight / sqrt(var + eps),  y = act(z)
//   g = grad act'(z),  grad_bias = sum g,  grad_weight = sum g (x - mean) / sqrt(var + eps)
//   grad_x = scale (g - mean of g - (x - mean) / sqrt(var + eps) * mean of g (x - mean) / sqrt(var + eps))
// The mean is taken off x first: folding it into the bias would cancel digits where it is large.
#pragma once
#include <cstdint>

#include "../common/math.h"

namespace ef::batch_norm_act {
template <typename A>
struct Channel {
  A mean, scale, bias;
};
// grad_x = scale g + shift + slope (x - mean)
template <typename A>
struct GradChannel {
  A shift, slope;
};
// From the gradients of bias and weight times `factor`; scale = weight inverse.
template <typename A>
EF_HD GradChannel<A> grad_channel_of(A scale, A inverse, A grad_bias, A grad_weight, A factor) {
  return {-scale * (grad_bias * factor), -scale * inverse * (grad_weight * factor)};
}

template <typename A>
EF_HD A inverse_deviation(A var, A eps) {
  return inverse_sqrt_of(var + eps);
}

// What running statistics become; computed from the nearer end, so that a momentum of 1 gives the batch's exactly.
template <typename A>
EF_HD A moved(A running, A batch, A momentum) {
  const A way = batch - running;
  return momentum < A(0.5) ? running + momentum * way : batch - way * (A(1) - momentum);
}
template <typename A>
EF_HD A unbiased(A var, int64_t values) {
  return var * A(double(values) / double(values - 1));
}

template <Activation kActivation, typename A>
EF_HD A value(A x, A mean, A scale, A bias) {
  return activate<kActivation>((x - mean) * scale + bias);
}

// g, from the distance of x to the mean.
template <Activation kActivation, typename A>
EF_HD A grad_normalized(A grad, A distance, A scale, A bias) {
  return activate_backward<kActivation>(grad, distance * scale + bias);
}

// Distances whose squares are summed are those to the median of three values of a part: near its mean, whatever one outlier does.
template <typename A>
EF_HD A median(A a, A b, A c) {
  const A low = a < b ? a : b, high = a < b ? b : a;
  return c < low ? low : (c < high ? c : high);
}

// What one part of the values adds to the sum of squared distances to the overall mean: its own sums are of the distances to `pivot`.
EF_HD double squares_about(double mean, double count, double pivot, double sum, double squares) {
  const double d = pivot - mean;
  return squares + d * (2 * sum + count * d);
}
}  // namespace ef::batch_norm_act
