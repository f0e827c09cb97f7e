// A caching allocator for CPU outputs of 128 KiB and more. The C library returns such blocks to the kernel, and zeroing the fresh pages
// of the next one costs as much as the kernel that writes it.
#pragma once
#include <cstdint>
#include <map>
#include <mutex>
#include <unordered_map>

namespace ef {
// One pool for the process, in the library of the CPU's kernels.
class CachingAllocator {
 public:
  static constexpr int64_t kLeast = int64_t(128) << 10;  // bytes; glibc maps no smaller ones by themselves

  static CachingAllocator& instance();

  void* allocate(int64_t bytes);
  void free(void* block);
  // Returns unused blocks to the system, and counts anew how much is in use at once.
  void empty();

 private:
  CachingAllocator();
  void* new_block(int64_t size);
  void drop_down_to(int64_t bytes);

  std::mutex mutex_;
  std::multimap<int64_t, void*> free_;
  std::unordered_map<void*, int64_t> sizes_;
  int64_t used_bytes_ = 0, free_bytes_ = 0, max_used_ = 0;
};
}  // namespace ef
