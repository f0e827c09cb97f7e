// The caching allocator of CPU outputs: blocks by size, the most recently freed first.
#include "caching_allocator.h"

#include <pthread.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ef {
namespace {
constexpr int64_t kPage = 4096, kHugePage = int64_t(2) << 20;

int64_t rounded_up(int64_t bytes, int64_t unit) { return (bytes + unit - 1) / unit * unit; }
// Whole huge pages where that is at most a quarter more than was asked for, else whole pages.
int64_t block_size(int64_t bytes) {
  const int64_t huge = rounded_up(bytes, kHugePage);
  return huge <= bytes + bytes / 4 ? huge : rounded_up(bytes, kPage);
}

// Asks for huge pages behind a new, large allocation on the host. glibc maps what has 32 MiB or more anew for every tensor and gives
// the free end of its heap back to the kernel, so that tensors of some MiB lie on new pages in many calls too: the first write to each
// 4 KiB then traps, which can take several times as long as the kernel that writes. Where they cannot be had nothing changes.
void prefer_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < kHugePage) return;
  // Whole pages, so that neighbors in the heap join, and a huge page may lie across both.
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + uintptr_t(bytes) + kPage - 1) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory;
  (void)bytes;
#endif
}
}  // namespace

CachingAllocator& CachingAllocator::instance() {
  static CachingAllocator& blocks = *new CachingAllocator;  // never destroyed: tensors may live until the process ends
  return blocks;
}

CachingAllocator::CachingAllocator() {
  // A process may fork while another thread holds the lock.
  pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); }, [] { instance().mutex_.unlock(); });
}

void* CachingAllocator::allocate(int64_t bytes) {
  const int64_t size = block_size(bytes);
  const std::lock_guard lock(mutex_);
  const auto found = free_.lower_bound(size);
  void* block;
  if (found != free_.end() && found->first <= size + size / 8) {
    block = found->second;
    free_bytes_ -= found->first;
    free_.erase(found);
  } else {
    block = new_block(size);
  }
  used_bytes_ += sizes_[block];
  max_used_ = std::max(max_used_, used_bytes_);
  drop_down_to(max_used_ + max_used_ / 4 - used_bytes_);
  return block;
}

void CachingAllocator::free(void* block) {
  const std::lock_guard lock(mutex_);
  const int64_t size = sizes_[block];
  used_bytes_ -= size;
  free_bytes_ += size;
  free_.emplace_hint(free_.lower_bound(size), size, block);  // the newest of its size comes next: caches may still hold it
}

void CachingAllocator::empty() {
  const std::lock_guard lock(mutex_);
  drop_down_to(0);
  max_used_ = used_bytes_;
}

void* CachingAllocator::new_block(int64_t size) {
  const int64_t alignment = size < kHugePage ? kPage : kHugePage;
  void* block = std::aligned_alloc(alignment, rounded_up(size, alignment));
  if (!block) {
    drop_down_to(0);
    block = std::aligned_alloc(alignment, rounded_up(size, alignment));
  }
  if (!block) throw std::bad_alloc();
  prefer_huge_pages(block, size / kHugePage * kHugePage);
  sizes_[block] = size;
  return block;
}

void CachingAllocator::drop_down_to(int64_t bytes) {
  while (free_bytes_ > bytes) {
    const auto largest = std::prev(free_.end());
    free_bytes_ -= largest->first;
    sizes_.erase(largest->second);
    std::free(largest->second);
    free_.erase(largest);
  }
}
}  // namespace ef
