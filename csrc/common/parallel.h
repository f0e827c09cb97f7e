// What the CPU kernels have of their process: the threads of PyTorch's own pool, reached through its C interface, and memory that each
// thread keeps.
#pragma once
#include <torch/csrc/stable/c/shim.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "platform.h"

namespace ef {
// Calls f(begin, end) over [0, n) on several threads, at least `grain` indices each. Which thread gets what depends on the thread
// count: a result must not.
template <class F>
void parallel_for(int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  auto call = [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); };
  if (torch_parallel_for(0, n, grain, call, const_cast<void*>(static_cast<const void*>(&f))) != 0) {
    throw std::runtime_error("effdet_fast: a CPU kernel failed in a worker thread");
  }
}

// Working memory that a thread keeps from call to call, at a multiple of 64 bytes; `slot` tells apart what is alive at one time.
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
