// Loops of the CPU kernels run over lanes, each with the constants and the sum of its channel beside it (a pointer), or with constants
// that are the same in all.
#pragma once
#include <algorithm>

#include "platform.h"

namespace ef {
template <typename A>
struct Same {
  A value;
  EF_HD A operator[](int64_t) const { return value; }
};

// The sum of each channel's lanes: neighbours in planes, else every `channels`-th.
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
