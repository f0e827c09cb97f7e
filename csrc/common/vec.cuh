// Vector memory access of the CUDA kernels, to values and to boxes: the only place where a pointer is reinterpreted.
#pragma once
#include <cstring>

#include "box.h"
#include "platform.h"

namespace ef {
template <typename T, int kSize>
struct alignas(sizeof(T) * kSize) Vec {
  T v[kSize];
};
// One 16-byte access; one value of float64, which only gradient checks use: as few kernels as do.
template <typename T>
inline constexpr int kVecSize = sizeof(T) == 8 ? 1 : 16 / sizeof(T);

template <int kSize, typename T>
EF_HD Vec<T, kSize> load_vec(const T* p) {
  return *reinterpret_cast<const Vec<T, kSize>*>(p);
}
// To global memory. 8 and 16 bytes go out by an instruction of their own: whether nvcc merges a struct's members is up to the code around
// it. Two halves go out as a word, for the same reason.
template <int kSize, typename T>
EF_HD void store_vec(T* p, const Vec<T, kSize>& value) {
#if defined(__CUDA_ARCH__)
  if constexpr (kSize > 1 && sizeof(value) >= 4) {
    uint32_t w[sizeof(value) / 4];
    std::memcpy(w, &value, sizeof(w));
    if constexpr (sizeof(value) == 16) {
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3])
                   : "memory");
    } else if constexpr (sizeof(value) == 8) {
      asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "r"(w[0]), "r"(w[1]) : "memory");
    } else {
      *reinterpret_cast<uint32_t*>(p) = w[0];
    }
    return;
  }
#endif
  *reinterpret_cast<Vec<T, kSize>*>(p) = value;
}
// kSize values as a load leaves them, for those that are loaded ahead of their use. Halves and bytes stay words: nvcc would take words
// apart, and a struct of halves together again, right behind the load, and so wait for it there.
template <typename T, int kSize>
struct Packed {
  using Word = std::conditional_t<sizeof(T) < 4 && kSize * sizeof(T) % 4 == 0, uint32_t, T>;
  Vec<Word, kSize * sizeof(T) / sizeof(Word)> words;
};
template <int kSize, typename T>
EF_HD Packed<T, kSize> load_packed(const T* p) {
  return *reinterpret_cast<const Packed<T, kSize>*>(p);
}
// values[i] = value i of `packed`. A bfloat16 is the upper half of a float: two in a word are one shift and one mask, where nvcc takes
// three.
template <int kSize, typename T, typename A>
EF_HD void unpack(const Packed<T, kSize>& packed, A (&values)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    if constexpr (!std::is_same_v<typename Packed<T, kSize>::Word, uint32_t>) {
      values[i] = A(packed.words.v[i]);
    } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
      const uint32_t bits = i % 2 == 0 ? packed.words.v[i / 2] << 16 : packed.words.v[i / 2] & 0xffff0000u;
      std::memcpy(&values[i], &bits, sizeof(bits));
    } else {
      values[i] = A(T(uint16_t(packed.words.v[i / 2] >> i % 2 * 16), T::from_bits()));
    }
  }
}
// values[k] = p[k], by vectors.
template <int kCount, typename T, typename A>
EF_HD void load_neighbors(const T* p, A (&values)[kCount]) {
  constexpr int kSize = kCount < kVecSize<T> ? kCount : kVecSize<T>;
#pragma unroll
  for (int k = 0; k < kCount; k += kSize) {
    A some[kSize];
    unpack(load_packed<kSize>(p + k), some);
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[k + i] = some[i];
  }
}
// Hides from nvcc how a pointer to global memory was computed, so that it is stepped on from and not computed anew from its beginnings.
template <typename T>
EF_HD void forget_origin(T*& p) {
#if defined(__CUDA_ARCH__)
  asm("" : "+l"(p));
  __builtin_assume(__isGlobal(p));
#endif
}
// Hides from nvcc how a number was computed, so that it stays in a register and is not computed anew wherever it is used.
EF_HD float kept(float value) {
#if defined(__CUDA_ARCH__)
  asm("" : "+f"(value));
#endif
  return value;
}
EF_HD int64_t kept(int64_t value) {
#if defined(__CUDA_ARCH__)
  asm("" : "+l"(value));
#endif
  return value;
}
template <typename... T>
bool is_vec_aligned(const T*... p) {
  return ((reinterpret_cast<uintptr_t>(p) % 16 == 0) && ...);
}

// Box i of boxes [n, 4].
template <bool kAligned, typename scalar_t>
EF_HD Box<acc_t<scalar_t>> load_box(const scalar_t* boxes, int64_t i) {
  using A = acc_t<scalar_t>;
  constexpr int kSize = !kAligned ? 1 : kVecSize<scalar_t> < 4 ? 2 : 4;
  A corner[4];
#pragma unroll
  for (int k = 0; k < 4; k += kSize) {
    const Vec<scalar_t, kSize> part = load_vec<kSize>(boxes + i * 4 + k);
#pragma unroll
    for (int j = 0; j < kSize; ++j) corner[k + j] = A(part.v[j]);
  }
  return box_of(corner[0], corner[1], corner[2], corner[3]);
}
}  // namespace ef
