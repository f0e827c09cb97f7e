// Fresh memory in few page faults.
#pragma once
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ef {
// Asks for huge pages behind a new, large allocation on the host. glibc maps what has 32 MiB or more anew for every tensor, so that
// the first write to each 4 KiB page traps into the kernel: that can take several times as long as the kernel that writes. Where it
// cannot be had nothing changes.
inline void prefer_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kMappedAnew = int64_t(32) << 20, kPage = 4096;
  if (bytes < kMappedAnew) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + uintptr_t(bytes)) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory;
  (void)bytes;
#endif
}
}  // namespace ef
