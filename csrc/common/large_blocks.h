// Memory of tensors on the host, but for small ones, kept for later ones of their size. The C library gives such blocks back to the
// kernel, which must clear every page of the next: in a training step that took as long as the kernels that write them.
#pragma once
#include <pthread.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <unordered_map>

#include "huge_pages.h"

namespace ef {
class LargeBlocks {
 public:
  static constexpr int64_t kLeast = int64_t(128) << 10;  // bytes; glibc maps no smaller ones by themselves

  static LargeBlocks& instance() {
    static LargeBlocks& blocks = *new LargeBlocks;  // never destroyed: tensors may live until the process ends
    return blocks;
  }

  void* take(int64_t bytes) {
    const int64_t unit = unit_of(bytes), size = (bytes + unit - 1) / unit * unit;
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
    most_used_ = std::max(most_used_, used_bytes_);
    drop_down_to(most_used_ + most_used_ / 4 - used_bytes_);
    return block;
  }

  void give_back(void* block) {
    const std::lock_guard lock(mutex_);
    const int64_t size = sizes_[block];
    used_bytes_ -= size;
    free_bytes_ += size;
    free_.emplace_hint(free_.lower_bound(size), size, block);  // the newest of its size comes next: caches may still hold it
  }

  // Frees what is kept, and counts anew how much is in use at once.
  void empty() {
    const std::lock_guard lock(mutex_);
    drop_down_to(0);
    most_used_ = used_bytes_;
  }

 private:
  LargeBlocks() {
    // A process may fork while another thread holds the lock.
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); }, [] { instance().mutex_.unlock(); });
  }

  // Whole huge pages, or whole pages where a block is smaller than a huge one.
  static int64_t unit_of(int64_t bytes) {
    constexpr int64_t kPage = 4096, kHugePage = int64_t(2) << 20;
    return bytes < kHugePage ? kPage : kHugePage;
  }

  void* new_block(int64_t size) {
    void* block = std::aligned_alloc(unit_of(size), size);
    if (!block) {
      drop_down_to(0);
      block = std::aligned_alloc(unit_of(size), size);
    }
    if (!block) throw std::bad_alloc();
    prefer_huge_pages(block, size);
    sizes_[block] = size;
    return block;
  }

  void drop_down_to(int64_t bytes) {
    while (free_bytes_ > bytes) {
      const auto largest = std::prev(free_.end());
      free_bytes_ -= largest->first;
      sizes_.erase(largest->second);
      std::free(largest->second);
      free_.erase(largest);
    }
  }

  std::mutex mutex_;
  std::multimap<int64_t, void*> free_;
  std::unordered_map<void*, int64_t> sizes_;
  int64_t used_bytes_ = 0, free_bytes_ = 0, most_used_ = 0;
};
}  // namespace ef
