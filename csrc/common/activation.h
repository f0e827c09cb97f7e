// The pointwise activations an op can carry, and their gradients. Numbered as in effdet_fast/ops/_arguments.py.
#pragma once
#include "math.h"

namespace ef {
enum class Activation : int { kNone = 0, kSilu = 1, kRelu = 2, kRelu6 = 3 };

// NaN passes through, as in PyTorch: by how comparisons are written, and in SiLU as a factor.
template <Activation kActivation, typename T>
EF_HD T activate(T x) {
  if constexpr (kActivation == Activation::kSilu) return quotient_of(x, T(1) + exp_of_number(-x));
  if constexpr (kActivation == Activation::kRelu) return x < T(0) ? T(0) : x;
  if constexpr (kActivation == Activation::kRelu6) return x < T(0) ? T(0) : (x > T(6) ? T(6) : x);
  return x;
}

// The gradient for x from that for activate(x). What is cut off gets 0 even where `grad` is NaN, as in PyTorch.
template <Activation kActivation, typename T>
EF_HD T activate_backward(T grad, T x) {
  if constexpr (kActivation == Activation::kSilu) {
    const T s = quotient_of(T(1), T(1) + exp_of_number(-x));
    return grad * (s * (T(1) + x * (T(1) - s)));
  }
  if constexpr (kActivation == Activation::kRelu) return x <= T(0) ? T(0) : grad;
  if constexpr (kActivation == Activation::kRelu6) return x <= T(0) || x >= T(6) ? T(0) : grad;
  return grad;
}

// Calls f.template operator()<Activation::...>() for a number from Python.
template <class F>
void dispatch_activation(int64_t activation, F&& f) {
  switch (static_cast<Activation>(activation)) {
    case Activation::kSilu:
      return f.template operator()<Activation::kSilu>();
    case Activation::kRelu:
      return f.template operator()<Activation::kRelu>();
    case Activation::kRelu6:
      return f.template operator()<Activation::kRelu6>();
    default:
      return f.template operator()<Activation::kNone>();
  }
}
}  // namespace ef
