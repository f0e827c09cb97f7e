// cp.async for emulated kernels: a copy is made when its thread waits for it, and never if it does not.
#pragma once
#include <deque>

#include "cuda_emulation.h"

namespace ef::emulation {
struct AsyncCopy {
  void* to;
  const void* from;
  size_t bytes;
};
struct AsyncCopies {
  std::vector<AsyncCopy> begun;
  std::deque<std::vector<AsyncCopy>> groups;
};
// Those of the running thread. A block that ends leaves copies that nobody waited for; the next one has none.
inline AsyncCopies& async_copies() {
  static std::vector<AsyncCopies> of_threads;
  static const Block* block = nullptr;
  static dim3 index;
  const dim3 now = running->index;
  if (block != running || index.x != now.x || index.y != now.y || index.z != now.z) {
    of_threads.assign(running->size, {});
    block = running;
    index = now;
  }
  return of_threads[running->current];
}
inline void copy_async(void* to, const void* from, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes) throw std::runtime_error("misaligned copy");
  async_copies().begun.push_back({to, from, bytes});
}
inline void commit_copies() {
  AsyncCopies& own = async_copies();
  own.groups.push_back(std::move(own.begun));
  own.begun.clear();
}
inline void wait_for_copies(size_t left) {
  AsyncCopies& own = async_copies();
  for (; own.groups.size() > left; own.groups.pop_front()) {
    for (const AsyncCopy& copy : own.groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
  }
}
}  // namespace ef::emulation
