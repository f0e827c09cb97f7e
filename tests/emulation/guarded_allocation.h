// Memory for the outputs and workspaces of emulated kernels: filled with NaN bytes, between guards of the same bytes. What a kernel
// does not write stays NaN, what it reads past the end is NaN, and a write past the end is counted. Under AddressSanitizer the
// sanitizer's own red zones take the guards' place. While launches are observed, which run few blocks or none, it is zeros that take no
// memory before they are written.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <set>
#include <vector>

#include "observation.h"

namespace ef::emulation {
#if defined(__SANITIZE_ADDRESS__)
inline constexpr size_t kGuardBytes = 0;
#else
inline constexpr size_t kGuardBytes = 256;
#endif

struct GuardedBlock {
  unsigned char* start;
  size_t payload;
  bool operator<(const GuardedBlock& other) const { return start < other.start; }
  bool is_intact() const {
    const auto is_untouched = [](const unsigned char* p) {
      return std::all_of(p, p + kGuardBytes, [](unsigned char c) { return c == 0xff; });
    };
    return is_untouched(start) && is_untouched(start + kGuardBytes + payload);
  }
};
inline std::set<GuardedBlock> guarded_blocks;
inline int64_t guard_violations = 0;

inline torch::stable::Tensor guarded_empty(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                                           torch::headeronly::ScalarType dtype, torch::stable::Device device) {
  using torch::headeronly::ScalarType;
  size_t payload = dtype == ScalarType::Double || dtype == ScalarType::Long     ? 8
                   : dtype == ScalarType::Float || dtype == ScalarType::Int     ? 4
                   : dtype == ScalarType::Half || dtype == ScalarType::BFloat16 ? 2
                                                                                : 1;
  for (int64_t size : sizes) payload *= size;
  if (observed_blocks >= 0) {
    constexpr size_t kAlignment = 256;  // as on a GPU: where sectors begin counts
    void* memory = std::calloc(payload + kAlignment, 1);
    if (!memory) throw std::bad_alloc();
    const auto start = (reinterpret_cast<uintptr_t>(memory) + kAlignment) / kAlignment * kAlignment;
    return torch::stable::from_blob(reinterpret_cast<void*>(start), sizes, strides, device, dtype, [memory](void*) { std::free(memory); });
  }
  const size_t total = std::max<size_t>(1, payload + 2 * kGuardBytes);
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, total) != 0) throw std::bad_alloc();
  std::memset(memory, 0xff, total);
  const GuardedBlock block{static_cast<unsigned char*>(memory), payload};
  guarded_blocks.insert(block);
  return torch::stable::from_blob(block.start + kGuardBytes, sizes, strides, device, dtype, [block](void*) {
    guard_violations += !block.is_intact();
    guarded_blocks.erase(block);
    std::free(block.start);
  });
}
}  // namespace ef::emulation
