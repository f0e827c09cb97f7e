// Values as they lie in a 32-bit word, one float or two halves: comparisons of all of a word at once, and by them the maximum of a
// window and the number of its tap, in the same places of a second word. Of windows without NaN; with one, see is_new_maximum.
#pragma once
#include <cstring>

#include "../common/math.h"

namespace ef::fusion {
template <typename T>
inline constexpr uint32_t kOnes = sizeof(T) == 2 ? 0x00010001u : 1u;

// Calls f(value of a, value of b) for each place, and puts the bits that it returns there.
template <typename T, class F>
EF_HD uint32_t for_each_of_word(uint32_t a, uint32_t b, F&& f) {
  constexpr int kCount = 4 / sizeof(T);
  T x[kCount], y[kCount], result[kCount];
  std::memcpy(x, &a, 4);
  std::memcpy(y, &b, 4);
  for (int i = 0; i < kCount; ++i) result[i] = f(x[i], y[i]);
  uint32_t word;
  std::memcpy(&word, result, 4);
  return word;
}

// The larger value; NaN if there is one.
template <typename T>
EF_HD uint32_t larger(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t r;
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  } else if constexpr (std::is_same_v<T, c10::Half>) {
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  } else {
    float larger;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(__uint_as_float(a)), "f"(__uint_as_float(b)));
    r = __float_as_uint(larger);
  }
  return r;
#else
  return for_each_of_word<T>(a, b, [](T x, T y) { return float(x) > float(y) || float(x) != float(x) ? x : y; });
#endif
}

// All bits where they are equal, no bit elsewhere; NaN equals nothing.
template <typename T>
EF_HD uint32_t is_equal(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t r;
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    asm("set.eq.u32.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  } else if constexpr (std::is_same_v<T, c10::Half>) {
    asm("set.eq.u32.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  } else {
    r = __uint_as_float(a) == __uint_as_float(b) ? ~0u : 0u;
  }
  return r;
#else
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
  return for_each_of_word<T>(a, b, [](T x, T y) {
    const Bits bits = float(x) == float(y) ? Bits(~Bits(0)) : Bits(0);
    T result;
    std::memcpy(&result, &bits, sizeof(bits));
    return result;
  });
#endif
}
EF_HD uint32_t select(uint32_t mask, uint32_t a, uint32_t b) { return (mask & a) | (~mask & b); }

struct Maximum {
  uint32_t value, tap;
};

// taps[row][column]: a word of each tap of the windows. Taps outside the image repeat their neighbor inside: behind it that never
// counts, before it (where `row_inside` or `column_inside` of the first tap is 0, not ~0) the neighbor counts.
template <bool kTap, typename T>
EF_HD Maximum maximum_of(const uint32_t (&taps)[3][3], uint32_t row_inside, uint32_t column_inside) {
  Maximum maximum{};
#pragma unroll
  for (int row = 0; row < 3; ++row) {
    const uint32_t (&v)[3] = taps[row];
    const uint32_t of_row = larger<T>(larger<T>(v[0], v[1]), v[2]);
    const uint32_t value = row == 0 ? of_row : larger<T>(maximum.value, of_row);
    if (kTap) {
      const uint32_t not_first = select(is_equal<T>(v[1], of_row), (3 * row + 1) * kOnes<T>, (3 * row + 2) * kOnes<T>);
      const uint32_t tap = select(is_equal<T>(v[0], of_row) & column_inside, 3 * row * kOnes<T>, not_first);
      const uint32_t stays = is_equal<T>(maximum.value, value) & (row == 1 ? row_inside : ~0u);
      maximum.tap = row == 0 ? tap : select(stays, maximum.tap, tap);
    }
    maximum.value = value;
  }
  return maximum;
}
}  // namespace ef::fusion
