// Scalar functions shared by the ops' formulas, branch-free: loops over them vectorise on the host, and on a GPU they cost a few
// instructions where the exactly rounded ones take a branch to a slow path.
#pragma once
#include <cmath>
#include <cstring>

#include "platform.h"

namespace ef {
#if defined(__CUDA_ARCH__)
EF_HD float fma_of(float a, float b, float c) { return fmaf(a, b, c); }
EF_HD float exp_of(float x) { return expf(x); }
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
#else
EF_HD float fma_of(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
EF_HD float quotient_of(float a, float b) { return a / b; }
EF_HD float sqrt_of(float x) { return sqrtf(x); }
// exp by range reduction and a degree-6 polynomial, relative error 2e-7; the argument is clamped to [-87, 88].
EF_HD float exp_of(float x) {
  x = x < -87.f ? -87.f : (x > 88.f ? 88.f : x);
  const float k = __builtin_nearbyintf(x * 1.44269504f);
  const float r = __builtin_fmaf(k, 2.12194440e-4f, __builtin_fmaf(k, -0.693359375f, x));
  float p = 1.9875691500e-4f;
  p = __builtin_fmaf(p, r, 1.3981999507e-3f);
  p = __builtin_fmaf(p, r, 8.3334519073e-3f);
  p = __builtin_fmaf(p, r, 4.1665795894e-2f);
  p = __builtin_fmaf(p, r, 1.6666665459e-1f);
  p = __builtin_fmaf(p, r, 5.0000001201e-1f);
  p = __builtin_fmaf(p, r * r, r) + 1.f;
  const uint32_t bits = (static_cast<uint32_t>(static_cast<int32_t>(k)) + 127u) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return p * scale;
}
#endif

// log(1 + u) for 0 <= u <= 1 as 2 atanh(u / (2 + u)); relative error 2e-7, also for tiny u.
EF_HD float log1p_of(float u) {
  const float z = quotient_of(u, 2.f + u), z2 = z * z;
  float p = 1.f / 15;
  p = fma_of(p, z2, 1.f / 13);
  p = fma_of(p, z2, 1.f / 11);
  p = fma_of(p, z2, 1.f / 9);
  p = fma_of(p, z2, 1.f / 7);
  p = fma_of(p, z2, 1.f / 5);
  p = fma_of(p, z2, 1.f / 3);
  return 2.f * fma_of(p * z2, z, z);
}
EF_HD double exp_of(double x) { return ::exp(x); }
EF_HD double log1p_of(double u) { return ::log1p(u); }
EF_HD float log_of(float x) { return logf(x); }
EF_HD double log_of(double x) { return ::log(x); }
EF_HD double quotient_of(double a, double b) { return a / b; }
EF_HD double sqrt_of(double x) { return ::sqrt(x); }

// a / b for a >= 0, b > 0; 64-bit division is slow on a GPU and seldom needed.
EF_HD int64_t quotient(int64_t a, int64_t b) {
  return ((a | b) >> 32) == 0 ? int64_t(static_cast<uint32_t>(a) / static_cast<uint32_t>(b)) : a / b;
}

template <typename T>
EF_HD T sigmoid(T x) {
  return quotient_of(T(1), T(1) + exp_of(-x));
}
}  // namespace ef
