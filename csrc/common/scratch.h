// Working memory of the CPU kernels.
#pragma once
#include <cstddef>
#include <vector>

#include "platform.h"

namespace ef {
// Memory that a thread keeps from call to call, at a multiple of 64 bytes; `slot` tells apart what is alive at one time.
template <typename A>
A* scratch(int slot, int64_t count) {
  struct alignas(64) Line {
    std::byte bytes[64];
  };
  thread_local std::vector<Line> memory[3];
  const size_t lines = ceil_div(count * int64_t(sizeof(A)), sizeof(Line));
  if (memory[slot].size() < lines) memory[slot].resize(lines);
  return reinterpret_cast<A*>(memory[slot].data());
}
}  // namespace ef
