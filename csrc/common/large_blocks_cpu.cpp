#include "large_blocks.h"

#include <pthread.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <new>

#include "huge_pages.h"

namespace ef {
namespace {
// Whole huge pages, or whole pages where a block is smaller than a huge one.
int64_t unit_of(int64_t bytes) {
  constexpr int64_t kPage = 4096, kHugePage = int64_t(2) << 20;
  return bytes < kHugePage ? kPage : kHugePage;
}
}  // namespace

LargeBlocks& LargeBlocks::instance() {
  static LargeBlocks& blocks = *new LargeBlocks;  // never destroyed: tensors may live until the process ends
  return blocks;
}

LargeBlocks::LargeBlocks() {
  // A process may fork while another thread holds the lock.
  pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); }, [] { instance().mutex_.unlock(); });
}

void* LargeBlocks::take(int64_t bytes) {
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

void LargeBlocks::give_back(void* block) {
  const std::lock_guard lock(mutex_);
  const int64_t size = sizes_[block];
  used_bytes_ -= size;
  free_bytes_ += size;
  free_.emplace_hint(free_.lower_bound(size), size, block);  // the newest of its size comes next: caches may still hold it
}

void LargeBlocks::empty() {
  const std::lock_guard lock(mutex_);
  drop_down_to(0);
  most_used_ = used_bytes_;
}

void* LargeBlocks::new_block(int64_t size) {
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

void LargeBlocks::drop_down_to(int64_t bytes) {
  while (free_bytes_ > bytes) {
    const auto largest = std::prev(free_.end());
    free_bytes_ -= largest->first;
    sizes_.erase(largest->second);
    std::free(largest->second);
    free_.erase(largest);
  }
}
}  // namespace ef
