// Scalar functions shared by the ops' formulas, and the activations an op can carry. They are branch-free: loops over them vectorize on
// the host, and on a GPU they cost a few instructions where the exactly rounded ones take a branch to a slow path.
#pragma once
#include <cmath>
#include <cstring>

#include "choices.h"
#include "platform.h"

namespace ef {
// bounded_exp(x): exp(x), but nowhere so large that 1 / (1 + exp(x)) would be 0; some number where x is NaN. min_of: of numbers.
#if defined(__CUDA_ARCH__)
EF_HD float fma_of(float a, float b, float c) { return fmaf(a, b, c); }
EF_HD float exp_of(float x) { return expf(x); }
EF_HD float min_of(float a, float b) { return fminf(a, b); }
EF_HD float exp2_of(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
// The product's rounding makes their relative error |x| 1e-7; avoiding that would cost expf's six further instructions.
EF_HD float exp_of_number(float x) { return exp2_of(x * 1.44269504f); }
EF_HD float bounded_exp(float x) { return exp2_of(min_of(x * 1.44269504f, 126.f)); }
EF_HD float quotient_of(float a, float b) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(b));
  return a * r;
}
EF_HD float sqrt_of(float x) {
  float r;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
EF_HD float inverse_sqrt_of(float x) {
  float r;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
#else
EF_HD float fma_of(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
EF_HD float min_of(float a, float b) { return a < b ? a : b; }
EF_HD float quotient_of(float a, float b) { return a / b; }
EF_HD float sqrt_of(float x) { return sqrtf(x); }
EF_HD float inverse_sqrt_of(float x) { return 1.f / sqrtf(x); }
// exp of a number: by range reduction and a polynomial of degree 6, relative error 2e-7; the argument is clamped to [-87, 88], in which
// its bits are compared as integers (a negative float is a large unsigned one). Comparing floats with constants makes GCC fold what
// follows into three selects; a sum in powers of r^2 has the shortest chain of dependent operations.
EF_HD float exp_of_number(float x) {
  int32_t signed_bits;
  std::memcpy(&signed_bits, &x, sizeof(x));
  constexpr int32_t kHighest = 0x42b00000;
  constexpr uint32_t kLowest = 0xc2ae0000u;
  const uint32_t below = static_cast<uint32_t>(signed_bits < kHighest ? signed_bits : kHighest);
  const uint32_t bits = below < kLowest ? below : kLowest;
  std::memcpy(&x, &bits, sizeof(x));
  // Adding 1.5 * 2^23 rounds to an integer and leaves it, with the bias of the exponent, in the low bits.
  constexpr float kRound = 12582912.f + 127.f;
  const float shifted = __builtin_fmaf(x, 1.44269504f, kRound), k = shifted - kRound;
  const float r = __builtin_fmaf(k, 2.12194440e-4f, __builtin_fmaf(k, -0.693359375f, x)), r2 = r * r;
  const float low = __builtin_fmaf(1.6666520063e-1f, r, 4.9999993409e-1f);
  const float high = __builtin_fmaf(1.3814455727e-3f, r2, __builtin_fmaf(8.3687858016e-3f, r, 4.1668394738e-2f));
  const float p = __builtin_fmaf(__builtin_fmaf(high, r2, low), r2, 1.f + r);
  uint32_t exponent;
  std::memcpy(&exponent, &shifted, sizeof(exponent));
  exponent <<= 23;
  float scale;
  std::memcpy(&scale, &exponent, sizeof(scale));
  return p * scale;
}
EF_HD float exp_of(float x) {
  const float e = exp_of_number(x);
  return x != x ? x : e;
}
EF_HD float bounded_exp(float x) { return exp_of_number(x); }
#endif

// -log(1 - s) for 0 <= s <= 1/2 as s times a polynomial; relative error 2e-7, also for tiny s.
EF_HD float minus_log1m(float s) {
  float p = 1.4411076f;
  p = fma_of(p, s, -1.6958115f);
  p = fma_of(p, s, 1.2576694f);
  p = fma_of(p, s, -0.20353879f);
  p = fma_of(p, s, 0.26961273f);
  p = fma_of(p, s, 0.24280508f);
  p = fma_of(p, s, 0.33370063f);
  p = fma_of(p, s, 0.49999285f);
  p = fma_of(p, s, 1.f);
  return p * s;
}
EF_HD double exp_of(double x) { return ::exp(x); }
EF_HD double exp_of_number(double x) { return ::exp(x); }
EF_HD double bounded_exp(double x) { return ::exp(x < 700 ? x : 700); }
EF_HD double minus_log1m(double s) { return -::log1p(-s); }
EF_HD float log_of(float x) { return logf(x); }
EF_HD double log_of(double x) { return ::log(x); }
EF_HD double min_of(double a, double b) { return a < b ? a : b; }
EF_HD double quotient_of(double a, double b) { return a / b; }
EF_HD double sqrt_of(double x) { return ::sqrt(x); }
EF_HD double inverse_sqrt_of(double x) { return 1.0 / ::sqrt(x); }

// x where it is above 0, or NaN.
template <typename T>
EF_HD T positive_part(T x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, float>) {
    float r;
    asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(r) : "f"(x));
    return r;
  }
#endif
  return x < T(0) ? T(0) : x;
}

// a / b for a >= 0, b > 0; 64-bit division is slow on a GPU and seldom needed.
EF_HD int64_t quotient(int64_t a, int64_t b) {
  return ((a | b) >> 32) == 0 ? int64_t(static_cast<uint32_t>(a) / static_cast<uint32_t>(b)) : a / b;
}

template <typename T>
EF_HD T sigmoid(T x) {
  return quotient_of(T(1), T(1) + exp_of(-x));
}

// The pointwise activations. NaN gives NaN, as in PyTorch: comparisons are false for it, so that x is returned, and SiLU divides x.
template <Activation kActivation, typename T>
EF_HD T activate(T x) {
  static_assert(count_of(Activation{}) == 4, "a branch for the new activation");
  if constexpr (kActivation == Activation::kSilu) return quotient_of(x, T(1) + exp_of_number(-x));
  if constexpr (kActivation == Activation::kRelu) return x < T(0) ? T(0) : x;
  if constexpr (kActivation == Activation::kRelu6) return x < T(0) ? T(0) : (x > T(6) ? T(6) : x);
  return x;
}

// The gradient for x from that for activate(x). What is cut off gets 0 even where `grad` is NaN, as in PyTorch.
template <Activation kActivation, typename T>
EF_HD T activate_backward(T grad, T x) {
  static_assert(count_of(Activation{}) == 4, "a branch for the new activation");
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
  static_assert(count_of(Activation{}) == 4, "a branch for the new activation");
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
