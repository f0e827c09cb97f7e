// What the tests may set and ask of the emulation, by ctypes.
#include "../../csrc/common/platform.h"
#include "cuda_emulation.h"
#include "guarded_allocation.h"

extern "C" {
void ef_set_thread_order_seed(unsigned seed) { ef::emulation::thread_order_seed = seed; }

void ef_set_multiprocessors(int64_t count) { ef::emulation::multiprocessors = count; }
void ef_set_blocks_that_fit(int64_t (*f)(const char*, int64_t, uint64_t)) { ef::emulation::blocks_that_fit = f; }
// Launches go to this stream; into a graph while `capture`, which numbers it, is not 0. ef_replay runs a captured launch.
void ef_set_stream(uintptr_t stream) { ef::emulation::stream = reinterpret_cast<void*>(stream); }
void ef_set_capture(uint64_t capture) { ef::emulation::capture = capture; }
uint64_t ef_captured_count() { return ef::emulation::captured.size(); }
void ef_replay(uint64_t launch) { ef::emulation::captured.at(launch)(); }
void ef_set_between_blocks(bool (*call)(uint64_t blocks)) { ef::emulation::between_blocks = call; }

// From now on launches are recorded, and `blocks` blocks of each run; -1 ends that. Forgets the earlier ones.
void ef_observe(int64_t blocks) {
  ef::emulation::observed_blocks = blocks;
  ef::emulation::launches.clear();
}
const ef::emulation::Launch* ef_launches() { return ef::emulation::launches.data(); }
uint64_t ef_launch_count() { return ef::emulation::launches.size(); }

// Buffers written outside their bounds since the last call, those still alive included.
int64_t ef_take_guard_violations() {
  using namespace ef::emulation;
  int64_t count = guard_violations;
  for (const GuardedBlock& block : guarded_blocks) count += !block.is_intact();
  guard_violations = 0;
  return count;
}
}
