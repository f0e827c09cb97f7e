// Memory of tensors on the host, but for small ones, kept for later ones of their size. The C library gives such blocks back to the
// kernel, which must clear every page of the next: in a training step that took as long as the kernels that write them.
#pragma once
#include <cstdint>
#include <map>
#include <mutex>
#include <unordered_map>

namespace ef {
// One pool for the process, in the library of the CPU's kernels.
class LargeBlocks {
 public:
  static constexpr int64_t kLeast = int64_t(128) << 10;  // bytes; glibc maps no smaller ones by themselves

  static LargeBlocks& instance();

  void* take(int64_t bytes);
  void give_back(void* block);
  // Frees what is kept, and counts anew how much is in use at once.
  void empty();

 private:
  LargeBlocks();
  void* new_block(int64_t size);
  void drop_down_to(int64_t bytes);

  std::mutex mutex_;
  std::multimap<int64_t, void*> free_;
  std::unordered_map<void*, int64_t> sizes_;
  int64_t used_bytes_ = 0, free_bytes_ = 0, max_used_ = 0;
};
}  // namespace ef
