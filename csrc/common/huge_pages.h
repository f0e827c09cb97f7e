// Fresh memory in few page faults.
#pragma once
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ef {
// Asks for huge pages behind a new, large allocation on the host. glibc maps what has 32 MiB or more anew for every tensor and gives
// the free end of its heap back to the kernel, so that tensors of some MiB lie on new pages in many calls too: the first write to each
// 4 KiB then traps, which can take several times as long as the kernel that writes. Where they cannot be had nothing changes.
inline void prefer_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kHugePage = int64_t(2) << 20, kPage = 4096;
  if (bytes < kHugePage) return;
  // Whole pages, so that neighbours in the heap join, and a huge page may lie across both.
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + uintptr_t(bytes) + kPage - 1) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory;
  (void)bytes;
#endif
}
}  // namespace ef
