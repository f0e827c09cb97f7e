// Copies from global to shared memory that go on while a thread computes (cp.async). What a thread has begun since its last `commit` is a
// group; `wait_for_copies<kLeft>` ends when all but its last kLeft groups have arrived, for itself: others need a barrier behind that.
#pragma once
#include "../../csrc/common/launch.cuh"
#if defined(EF_EMULATE_CUDA)
#include "async_copy_emulation.h"  // tests/emulation: data arrive at the wait and no earlier
#endif

namespace ef::variants {
// kBytes: 4, or 16, which passes by the L1 cache.
template <int kBytes>
__device__ void copy_async(void* shared, const void* global) {
#if defined(__CUDA_ARCH__)
  const uint32_t to = uint32_t(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(__cvta_generic_to_global(global)) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(__cvta_generic_to_global(global)), "n"(kBytes) : "memory");
  }
#elif defined(EF_EMULATE_CUDA)
  emulation::copy_async(shared, global, kBytes);
#endif
}
__device__ inline void commit_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#elif defined(EF_EMULATE_CUDA)
  emulation::commit_copies();
#endif
}
template <int kLeft>
__device__ void wait_for_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#elif defined(EF_EMULATE_CUDA)
  emulation::wait_for_copies(kLeft);
#endif
}
}  // namespace ef::variants
