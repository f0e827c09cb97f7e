// Squeeze-and-excite of one value, and the gradient; the two small matrix products from the means to the gates are PyTorch's:
//   mean = sum x / pixels,  gate = expand(act(reduce(mean))),  y = x s,  s = sigmoid(gate)
//   grad_gate = s (1 - s) sum(grad x),  grad_x = grad s + grad_mean / pixels
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
