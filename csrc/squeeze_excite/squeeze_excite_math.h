// Squeeze-and-excite of one value, and the gradient:
//   mean = sum x / pixels,  reduced = R mean + r,  squeezed = act(reduced),  gate = E squeezed + e,  y = x s,  s = sigmoid(gate)
//   grad_gate = s (1 - s) sum(grad x),  grad_reduced = act'(reduced) E^T grad_gate,  grad_mean = R^T grad_reduced
//   grad_x = grad s + grad_mean / pixels
#pragma once
#include "../common/math.h"

namespace ef::squeeze_excite {
template <typename A>
EF_HD A grad_gate(A sum_of_products, A gate) {
  const A s = sigmoid(gate);
  return sum_of_products * s * (A(1) - s);
}

template <bool kShift, typename A>
EF_HD A scaled(A x, A scale, A shift) {
  return kShift ? x * scale + shift : x * scale;
}
}  // namespace ef::squeeze_excite
