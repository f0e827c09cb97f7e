// Sees what emulated threads load and store: g++ -fsanitize=thread calls these functions at every access. They take the place of
// ThreadSanitizer's library, which is not linked; this file is compiled without the flag.
#include <pthread.h>

#include <algorithm>
#include <map>

#include "../../csrc/common/platform.h"
#include "cuda_emulation.h"

namespace ef::emulation {
namespace {
struct Access {
  const void* instruction;
  uintptr_t address;
  uint32_t size, thread, execution;
  bool is_store;
  auto key() const { return std::make_tuple(thread / 32, instruction, execution); }
};
bool recording = false;
Range shared_memory_range, launcher_stack;
std::vector<Range> ignored;
std::vector<uintptr_t> stack_begins;
std::vector<Access> accesses;
std::map<std::pair<uint32_t, const void*>, uint32_t> executions;

Range stack_of_this_thread() {
  pthread_attr_t attributes;
  void* begin = nullptr;
  size_t size = 0;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &begin, &size);
  pthread_attr_destroy(&attributes);
  return {begin, size};
}

void record(const void* address, size_t size, bool is_store, const void* instruction) {
  if (!recording) return;
  const auto at = reinterpret_cast<uintptr_t>(address);
  const uint32_t thread = running->current;
  const auto above = std::upper_bound(stack_begins.begin(), stack_begins.end(), at);
  if (launcher_stack.has(at) || (above != stack_begins.begin() && at - above[-1] < kStackBytes)) return;
  if (std::any_of(ignored.begin(), ignored.end(), [&](const Range& range) { return range.has(at); })) return;
  accesses.push_back({instruction, at, uint32_t(size), thread, executions[{thread, instruction}]++, is_store});
}

// Different 4-byte words of one bank take turns; wide accesses go in halves or quarters of a warp.
void add_shared(Requests& to, const Access* first, const Access* last) {
  const unsigned lanes_at_once = first->size <= 4 ? 32 : first->size == 8 ? 16 : 8;
  for (unsigned lane = 0; lane < 32; lane += lanes_at_once) {
    std::vector<uintptr_t> words;
    for (const Access* a = first; a != last; ++a) {
      if (a->thread % 32 / lanes_at_once * lanes_at_once != lane) continue;
      for (uintptr_t word = a->address / 4; word <= (a->address + a->size - 1) / 4; ++word) words.push_back(word);
    }
    if (words.empty()) continue;
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    unsigned of_bank[32] = {};
    for (uintptr_t word : words) ++of_bank[word % 32];
    to.touched += *std::max_element(of_bank, of_bank + 32);
    to.least += (words.size() + 31) / 32;
  }
}
void add_global(Requests& to, const Access* first, const Access* last) {
  std::vector<uintptr_t> bytes, sectors;
  for (const Access* a = first; a != last; ++a) {
    for (uintptr_t byte = a->address; byte < a->address + a->size; ++byte) bytes.push_back(byte);
  }
  std::sort(bytes.begin(), bytes.end());
  bytes.erase(std::unique(bytes.begin(), bytes.end()), bytes.end());
  for (uintptr_t byte : bytes) {
    if (sectors.empty() || sectors.back() != byte / 32) sectors.push_back(byte / 32);
  }
  to.touched += sectors.size();
  to.least += (bytes.size() + 31) / 32;
}
}  // namespace

void begin_requests(Range shared, std::vector<Range> private_memory) {
  shared_memory_range = shared;
  ignored = std::move(private_memory);
  launcher_stack = stack_of_this_thread();
  stack_begins.clear();
  for (const auto& stack : stacks) stack_begins.push_back(reinterpret_cast<uintptr_t>(stack.get()));
  std::sort(stack_begins.begin(), stack_begins.end());
  accesses.clear();
  executions.clear();
  recording = true;
}

void end_requests() {
  recording = false;
  Launch& launch = launches.back();
  std::sort(accesses.begin(), accesses.end(), [](const Access& a, const Access& b) { return a.key() < b.key(); });
  for (size_t first = 0, last; first < accesses.size(); first = last) {
    last = first;
    size_t size = 0;
    for (; last < accesses.size() && accesses[last].key() == accesses[first].key(); ++last) size += accesses[last].size;
    const bool is_store = accesses[first].is_store, is_shared = shared_memory_range.has(accesses[first].address);
    Requests& to = is_shared ? (is_store ? launch.shared_stores : launch.shared_loads) : (is_store ? launch.stores : launch.loads);
    ++to.count;
    to.bytes += size;
    for (int width = 0; width < 5; ++width) to.of_width[width] += accesses[first].size == 1u << width;
    (is_shared ? add_shared : add_global)(to, &accesses[first], &accesses[0] + last);
  }
}
}  // namespace ef::emulation

#define EF_OF_SIZE(prefix, size)                                                                                    \
  void __tsan_##prefix##read##size(void* p) { ef::emulation::record(p, size, false, __builtin_return_address(0)); } \
  void __tsan_##prefix##write##size(void* p) { ef::emulation::record(p, size, true, __builtin_return_address(0)); }
extern "C" {
EF_OF_SIZE(, 1)
EF_OF_SIZE(, 2)
EF_OF_SIZE(, 4)
EF_OF_SIZE(, 8)
EF_OF_SIZE(, 16)
EF_OF_SIZE(unaligned_, 2)
EF_OF_SIZE(unaligned_, 4)
EF_OF_SIZE(unaligned_, 8)
EF_OF_SIZE(unaligned_, 16)
void __tsan_read_range(void* p, unsigned long size) { ef::emulation::record(p, size, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, unsigned long size) { ef::emulation::record(p, size, true, __builtin_return_address(0)); }
uint8_t __tsan_atomic8_load(const volatile uint8_t* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
int __tsan_atomic32_fetch_add(volatile int* p, int value, int) { return __atomic_fetch_add(p, value, __ATOMIC_SEQ_CST); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
}
