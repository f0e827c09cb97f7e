// Threads for the CPU kernels: PyTorch's own pool, reached through its C interface.
#pragma once
#include <torch/csrc/stable/c/shim.h>

#include <cstdint>
#include <stdexcept>

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
}  // namespace ef
