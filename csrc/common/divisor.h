// Division by a number that is known when a kernel is launched: a product, a sum and a shift instead of some twenty instructions.
#pragma once
#include "platform.h"

namespace ef {
// For dividends below 2^31. With 2^shift >= value, the multiplier and 2^32 together are 2^(32 + shift) / value, rounded up.
struct Divisor {
  uint32_t value = 1, multiplier = 1, shift = 0;
  Divisor() = default;
  explicit Divisor(int64_t divisor) : value(uint32_t(divisor)) {
    while (int64_t(1) << shift < divisor) ++shift;
    multiplier = uint32_t((((uint64_t(1) << shift) - value) << 32) / value + 1);
  }
  EF_HD uint32_t quotient(uint32_t dividend) const { return (uint32_t((uint64_t(dividend) * multiplier) >> 32) + dividend) >> shift; }
  EF_HD uint32_t remainder(uint32_t dividend) const { return dividend - quotient(dividend) * value; }
};
}  // namespace ef
