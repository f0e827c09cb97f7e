// How the CPU kernels use vectors: as types of 32 bytes, which GCC and clang map to what the instruction set has (eight floats or four
// doubles, read from and written to every storage type; a single A is a vector of one lane); or by loops over lanes, each with the
// constants and the sum of its channel beside it (a pointer), or with constants that are the same in all.
#pragma once
#include <algorithm>
#include <cstring>

#include "platform.h"

#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wpsabi"  // every function that takes or returns a vector is inlined
#endif

namespace ef {
template <typename A>
struct VectorOf {
  typedef A type __attribute__((vector_size(32)));
};

// Vectors of 64 bytes: a register of AVX-512, two anywhere else.
template <typename A>
struct WideVectorOf {
  typedef A type __attribute__((vector_size(64)));
};

template <typename V, typename A>
inline constexpr int kLanes = sizeof(V) / sizeof(A);

template <typename V, typename A>
EF_HD V load(const A* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <typename V, typename A>
EF_HD void store(A* p, const V& v) {
  std::memcpy(p, &v, sizeof(V));
}

using Floats = VectorOf<float>::type;
using Words = VectorOf<uint32_t>::type;
typedef uint16_t Halves __attribute__((vector_size(16)));

EF_HD Floats load(const c10::BFloat16* p) { return (Floats)(__builtin_convertvector(load<Halves>(p), Words) << 16); }
EF_HD Floats load(const c10::Half* p) {
  const Words bits = __builtin_convertvector(load<Halves>(p), Words), magnitude = bits & 0x7fff;
  constexpr uint32_t kRebias = 112u << 23;
  Words normal = (magnitude << 13) + kRebias;
  normal = magnitude >= 0x7c00 ? normal + kRebias : normal;  // inf and NaN
  typedef int32_t Ints __attribute__((vector_size(32)));
  const Words tiny = (Words)(__builtin_convertvector((Ints)magnitude, Floats) * 0x1p-24f);
  return (Floats)((magnitude < 0x400 ? tiny : normal) | (bits & 0x8000) << 16);
}
EF_HD Floats load(const float* p) { return load<Floats>(p); }
EF_HD VectorOf<double>::type load(const double* p) { return load<VectorOf<double>::type>(p); }

// Rounded to the nearest, ties to even.
EF_HD void store(c10::BFloat16* p, const Floats& v) {
  const Words bits = (Words)v, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  store(p, __builtin_convertvector(v != v ? Words{} + 0x7fc0 : rounded, Halves));
}
EF_HD void store(c10::Half* p, const Floats& v) {
  const Words bits = (Words)v, magnitude = bits & 0x7fffffff;
  constexpr uint32_t kRebias = 112u << 23;
  const Words normal = (magnitude - kRebias + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const Words tiny = (Words)((Floats)magnitude + 0.5f) - 0x3f000000;  // one half has the last place of float16's smallest numbers
  Words rounded = magnitude < (113u << 23) ? tiny : normal;
  rounded = magnitude >= 0x477ff000 ? Words{} + 0x7c00 : rounded;
  rounded = magnitude > 0x7f800000 ? Words{} + 0x7e00 : rounded;
  store(p, __builtin_convertvector(rounded | bits >> 16 & 0x8000, Halves));
}

template <typename A>
struct Same {
  A value;
  EF_HD A operator[](int64_t) const { return value; }
};

// The sum of each channel's lanes: neighbors in planes, else every `channels`-th.
template <typename A>
EF_CPU_CLONES void fold(const A* __restrict lanes, int64_t count, int64_t channels, bool planes, A* __restrict out) {
  if (!planes) {
    std::copy_n(lanes, channels, out);
    for (int64_t i = channels; i < count; i += channels)
      for (int64_t c = 0; c < channels; ++c) out[c] += lanes[i + c];
    return;
  }
  const int64_t width = count / channels;
  for (int64_t c = 0; c < channels; ++c) {
    A total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < width; ++j) total += lanes[c * width + j];
    out[c] = total;
  }
}
}  // namespace ef
