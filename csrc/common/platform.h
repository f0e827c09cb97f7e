// What every file starts from: which compiler reads it (nvcc, a host compiler, or one that runs kernels under emulation), the devices,
// and the types that tensors store and kernels compute in.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define EF_HD __host__ __device__ __forceinline__
#else
#define EF_HD inline __attribute__((always_inline))
#endif

// Host loops marked with EF_CPU_CLONES are compiled once per instruction set and chosen when the library is loaded. A lambda inside such
// a function is not cloned: keep the loop itself in the marked function. Where the best loop is another with AVX-512, EF_CPU_AVX512
// marks it, which runs only if has_avx512(), and EF_CPU_CLONES_TO_AVX2 the one for the others.
// Under AddressSanitizer there is one version, as its wide loads would be told from an overrun by nothing else.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define EF_CPU_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define EF_CPU_CLONES_TO_AVX2 __attribute__((target_clones("arch=x86-64-v3", "default")))
#define EF_CPU_AVX512 __attribute__((target("arch=x86-64-v4")))
#define EF_CPU_HAS_AVX512 __builtin_cpu_supports("x86-64-v4")
#else
#define EF_CPU_CLONES
#define EF_CPU_CLONES_TO_AVX2
#define EF_CPU_AVX512
#define EF_CPU_HAS_AVX512 false
#endif

// Expands EF_DEFINE(scalar_t) for each storage type: explicit instantiation of the launch functions. Tests that need float32 alone build
// no more.
#if defined(EF_ONLY_FLOAT32)
#define EF_FOR_EACH_FLOATING(EF_DEFINE) EF_DEFINE(float)
#else
#define EF_FOR_EACH_FLOATING(EF_DEFINE) EF_DEFINE(double) EF_DEFINE(float) EF_DEFINE(c10::Half) EF_DEFINE(c10::BFloat16)
#endif

namespace ef {
// Where an op runs: the first argument of every launch function, so that one Tensor boundary serves both.
struct Cpu {};
struct Cuda {
  void* stream;
};

inline bool has_avx512() {
  static const bool has = EF_CPU_HAS_AVX512;
  return has;
}

// Arithmetic type of a storage type.
template <typename scalar_t>
using acc_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

EF_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
}  // namespace ef
