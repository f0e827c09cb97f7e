// What an emulated launch was, for observation.py: recorded instead of run, or with a few of its blocks run. In the observing build
// (build.py) the memory that those blocks ask for is recorded too.
#pragma once
#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace ef::emulation {
// A warp's k-th execution of one instruction is a request. Of global memory it touches `touched` sectors of 32 bytes, `least` if its
// bytes lay side by side; of shared memory it takes as many turns. Atomics are not counted. `of_width`: those in which a thread asks for
// 1, 2, 4, 8 or 16 bytes.
struct Requests {
  uint64_t count = 0, bytes = 0, touched = 0, least = 0, of_width[5] = {};
};
struct Launch {  // as observation.py reads it
  const char* kernel;
  uint64_t grid[3], block[3], shared_bytes, blocks_run;
  Requests loads = {}, stores = {}, shared_loads = {}, shared_stores = {};
};
inline int64_t observed_blocks = -1;  // launches are recorded, and of each this many blocks run; -1: not recorded, and all run
inline std::vector<Launch> launches;

inline const char* symbol_of(void* function) {
  Dl_info found{};
  dladdr(function, &found);
  return found.dli_sname;
}

// Memory that is neither global nor shared: the emulation's own, and stacks, kernel parameters among them.
struct Range {
  const void* begin;
  size_t size;
  bool has(uintptr_t address) const { return address - reinterpret_cast<uintptr_t>(begin) < size; }
};

#if defined(EF_OBSERVE)
#define EF_UNOBSERVED __attribute__((noinline, no_sanitize("thread")))  // inlined, its accesses would be its caller's
void begin_requests(Range shared, std::vector<Range> private_memory);
void end_requests();  // of the block that has run: added to those of the last launch
#else
#define EF_UNOBSERVED
#endif
}  // namespace ef::emulation
