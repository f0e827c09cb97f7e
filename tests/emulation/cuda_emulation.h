// Runs CUDA kernels on a CPU: each thread of a block is a fiber, blocks run one after another. Test-only.
// Shared memory starts as NaN bytes; the order of the threads and of the blocks is shuffled by seed, so that a missing barrier shows, and
// what relies on an order; what a thread hands to other blocks (__stcg) is there for them from its fence on; launch limits are checked as a
// device would; a barrier that some threads never reach is an error. Not modeled: races between blocks, the rounding of intrinsics, and
// warp functions with a partial mask (all threads of a warp that have not returned take part).
#pragma once
#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"
#include "observation.h"
#include "runtime_emulation.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace ef::emulation {
inline unsigned thread_order_seed = 0;  // of blocks too; 0: in order
// Of the device that is emulated; how many blocks of a kernel fit on one, by its symbol, threads and shared memory: 4 if nobody says.
inline int64_t multiprocessors = 132;
inline int64_t (*blocks_that_fit)(const char*, int64_t, uint64_t) = nullptr;

struct Barrier {
  unsigned arrived = 0, generation = 0;
};
// A store that other blocks do not see yet: memory has NaN bytes in its place until the thread's fence. Without one before the block's
// next atomic operation, by which it may tell others that it is done, they are there until the launch ends.
struct HeldStore {
  unsigned thread;  // kNoThread: no fence will come in time
  void* to;
  size_t bytes;
  unsigned char value[16];
};
inline constexpr unsigned kNoThread = ~0u;

struct Block {
  dim3 grid, block, index;
  unsigned size = 0, current = 0, live = 0;
  uint64_t progress = 0;  // barrier arrivals and returns; a round of all threads without any is a deadlock
  Barrier all;
  std::vector<Barrier> warps;
  std::vector<unsigned> order, warp_live;
  std::vector<uint64_t> exchange;
  std::vector<unsigned char> shared;
  std::vector<Context> fibers;
  std::vector<char> done;
  std::vector<HeldStore> held;  // of all blocks of the launch
  bool sees_others = false;     // a thread has had a fence since the block's last atomic operation
  bool vote = false;            // of __syncthreads_or
  Context scheduler;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
};
inline Block* running = nullptr;
inline std::vector<std::unique_ptr<char[]>> stacks;  // kept from launch to launch

inline dim3 thread_index() {
  const Block& b = *running;
  return dim3(b.current % b.block.x, b.current / b.block.x % b.block.y, b.current / (b.block.x * b.block.y));
}
inline void release_if_complete(Barrier& barrier, unsigned expected) {
  if (barrier.arrived && barrier.arrived >= expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
}
inline void wait(Barrier& barrier, unsigned expected) {
  const unsigned now = barrier.generation;
  ++barrier.arrived;
  ++running->progress;
  release_if_complete(barrier, expected);
  while (barrier.generation == now) from_fiber_to_scheduler(&running->fibers[running->current], running->scheduler, false);
}
inline unsigned warp_of_thread() { return running->current / 32; }
inline void sync_block() {
#if !defined(EF_EMULATION_WITHOUT_BARRIERS)  // a negative control: the suite must notice
  wait(running->all, running->live);
#endif
}
inline bool sync_block_or(bool predicate) {
  sync_block();  // all have read the vote before
  running->vote = false;
  sync_block();
  running->vote |= predicate;
  sync_block();
  return running->vote;
}
inline void sync_warp() { wait(running->warps[warp_of_thread()], running->warp_live[warp_of_thread()]); }

// Every lane publishes a value; then f reads what the lanes published.
template <class T, class F>
auto exchange(T value, F&& f) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  running->exchange[running->current] = bits;
  sync_warp();
  const auto result = f(running->exchange.data() + running->current / 32 * 32);
  sync_warp();
  return result;
}
template <class T>
T read_lane(T value, unsigned lane) {
  const uint64_t other = exchange(value, [&](const uint64_t* lanes) { return lanes[lane]; });
  T result;
  std::memcpy(&result, &other, sizeof(T));
  return result;
}
EF_UNOBSERVED inline void hold_back(void* to, size_t bytes) {
  if (observed_blocks >= 0) return;
  HeldStore store{running->current, to, bytes, {}};
  std::memcpy(store.value, to, bytes);
  std::memset(to, 0xff, bytes);
  running->held.push_back(store);
}
// What the block knows of others, and they of it, ends here: at its start, and at an atomic operation.
inline void end_fences(Block& b) {
  b.sees_others = false;
  for (HeldStore& store : b.held) store.thread = kNoThread;
}
inline void release_stores(Block& b, bool of_all) {
  const auto is_kept = [&](const HeldStore& store) { return !of_all && store.thread != b.current; };
  const auto first = std::stable_partition(b.held.begin(), b.held.end(), is_kept);
  for (auto store = first; store != b.held.end(); ++store) std::memcpy(store->to, store->value, store->bytes);
  b.held.erase(first, b.held.end());
}
EF_UNOBSERVED inline void fence() {
  if (observed_blocks >= 0) return;
#if !defined(EF_EMULATION_WITHOUT_FENCES)  // a negative control: the suite must notice
  release_stores(*running, false);
  running->sees_others = true;
#endif
}
EF_UNOBSERVED inline bool sees_others() { return running->sees_others || observed_blocks >= 0; }
inline void fiber_entry() {
  entered_fiber();
  Block& b = *running;
  b.body(b.argument);
  const unsigned warp = warp_of_thread();
  b.done[b.current] = 1;
  ++b.progress;
  --b.live;
  --b.warp_live[warp];
  release_if_complete(b.all, b.live);  // threads that return do not hold the others at a barrier
  release_if_complete(b.warps[warp], b.warp_live[warp]);
  from_fiber_to_scheduler(&b.fibers[b.current], b.scheduler, true);
}
template <class T>
Range range_of(const std::vector<T>& v) {
  return {v.data(), v.size() * sizeof(T)};
}
// What the emulation touches while a thread runs.
inline std::vector<Range> own_memory(const Block& b) {
  return {{&running, sizeof(running)}, {&stacks, sizeof(stacks)}, range_of(stacks),   range_of(b.exchange), range_of(b.warps),
          range_of(b.warp_live),       range_of(b.order),         range_of(b.fibers), range_of(b.done)};
}
inline void run_block(Block& b, const char* name) {
  const unsigned warps = (b.size + 31) / 32;
  b.live = b.size;
  b.all = {};
  end_fences(b);
  b.warps.assign(warps, {});
  for (unsigned w = 0; w < warps; ++w) b.warp_live[w] = std::min(32u, b.size - w * 32);
  std::fill(b.done.begin(), b.done.end(), 0);
  std::fill(b.shared.begin(), b.shared.end(), 0xff);
  std::fill(b.exchange.begin(), b.exchange.end(), ~uint64_t(0));
  for (unsigned i = 0; i < b.size; ++i) start_context(b.fibers[i], stacks[i].get(), b.scheduler, fiber_entry);
#if defined(EF_OBSERVE)
  if (observed_blocks >= 0) begin_requests({b.shared.data(), b.shared.size()}, own_memory(b));
#endif
  while (b.live) {
    const uint64_t before = b.progress;
    for (unsigned i : b.order) {
      if (b.done[i]) continue;
      b.current = i;
      from_scheduler_to(&b.scheduler, b.fibers[i], stacks[i].get());
    }
    if (b.progress == before) throw std::runtime_error(std::string(name) + ": deadlock: some threads never reach a barrier");
  }
}
// All blocks of a launch, or those that are to be observed; body(argument) is a thread.
inline void run_launch(const char* name, void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* argument) {
  const unsigned size = block.x * block.y * block.z;
  if (size == 0 || size > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 ||
      block.z > 64 || shared_bytes > (227u << 10)) {
    throw std::runtime_error(std::string(name) + ": launch failed: invalid configuration");
  }
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  const bool observed = observed_blocks >= 0;
  const uint64_t runs = observed ? std::min<uint64_t>(blocks, observed_blocks) : blocks;
  if (observed) {
    launches.push_back({symbol_of(kernel), {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared_bytes, runs});
    if (runs == 0) return;
  }
  Block b;
  b.grid = grid;
  b.block = block;
  b.size = size;
  b.body = body;
  b.argument = argument;
  b.shared.resize(shared_bytes);
  b.exchange.resize((size + 31) / 32 * 32);
  b.fibers.resize(size);
  b.done.resize(size);
  b.warp_live.resize((size + 31) / 32);
  for (unsigned i = 0; i < size; ++i) b.order.push_back(i);
  while (stacks.size() < size) stacks.emplace_back(new char[kStackBytes]);
  std::mt19937 random(thread_order_seed);
  std::vector<uint64_t> chosen(runs);
  std::iota(chosen.begin(), chosen.end(), uint64_t(0));
  if (observed) {
    // One of each share of the grid; where in its share varies, lest all fall on the same blockIdx.x.
    for (uint64_t& i : chosen) {
      const uint64_t first = i * blocks / runs, share = (i + 1) * blocks / runs - first;
      i = first + (share * uint32_t(i * 0x9e3779b9u) >> 32);
    }
  } else if (thread_order_seed) {
    std::shuffle(chosen.begin(), chosen.end(), random);
  }
  struct Running {
    Block* before = running;
    explicit Running(Block* b) { running = b; }
    ~Running() { running = before; }
  } scope(&b);
  uint64_t done = 0;
  for (const uint64_t i : chosen) {
    if (done > 0) run_between_blocks(name, done);
    ++done;
    b.index = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
    if (thread_order_seed) std::shuffle(b.order.begin(), b.order.end(), random);
    run_block(b, name);
#if defined(EF_OBSERVE)
    if (observed) end_requests();
#endif
  }
  release_stores(b, true);
}
}  // namespace ef::emulation

#define threadIdx (::ef::emulation::thread_index())
#define blockIdx (::ef::emulation::running->index)
#define blockDim (::ef::emulation::running->block)
#define gridDim (::ef::emulation::running->grid)

inline void __syncthreads() { ef::emulation::sync_block(); }
inline void __syncwarp(unsigned = ~0u) { ef::emulation::sync_warp(); }
inline int __syncthreads_or(int predicate) { return ef::emulation::sync_block_or(predicate != 0); }
inline void __threadfence() { ef::emulation::fence(); }
template <class T>
T __shfl_sync(unsigned, T v, int lane) {
  return ef::emulation::read_lane(v, lane & 31);
}
template <class T>
T __shfl_xor_sync(unsigned, T v, int mask) {
  return ef::emulation::read_lane(v, (ef::emulation::running->current % 32) ^ mask);
}
template <class T>
T __shfl_down_sync(unsigned, T v, int delta) {
  const unsigned lane = ef::emulation::running->current % 32;
  return ef::emulation::read_lane(v, lane + delta < 32 ? lane + delta : lane);
}
template <class T>
T __shfl_up_sync(unsigned, T v, int delta) {
  const unsigned lane = ef::emulation::running->current % 32;
  return ef::emulation::read_lane(v, lane >= unsigned(delta) ? lane - delta : lane);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  const unsigned lanes = std::min(32u, ef::emulation::running->size - ef::emulation::running->current / 32 * 32);
  return ef::emulation::exchange(uint64_t(predicate != 0), [&](const uint64_t* votes) {
    unsigned result = 0;
    for (unsigned i = 0; i < lanes; ++i)
      if (votes[i] == 1) result |= 1u << i;
    return result;
  });
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

// Threads of one launch never run at the same time here, so a plain read-modify-write is atomic.
template <class T>
EF_UNOBSERVED T ef_exchange(T* p, T value) {
  const T old = *p;
  *p = value;
  ef::emulation::end_fences(*ef::emulation::running);
  return old;
}
template <class T>
EF_UNOBSERVED T atomicAdd(T* p, std::type_identity_t<T> v) {
  return ef_exchange(p, T(*p + v));
}
template <class T>
EF_UNOBSERVED T atomicOr(T* p, std::type_identity_t<T> v) {
  return ef_exchange(p, T(*p | v));
}
template <class T>
EF_UNOBSERVED T atomicAnd(T* p, std::type_identity_t<T> v) {
  return ef_exchange(p, T(*p & v));
}
template <class T>
EF_UNOBSERVED T atomicMax(T* p, std::type_identity_t<T> v) {
  return ef_exchange(p, *p < v ? v : *p);
}
template <class T>
EF_UNOBSERVED T atomicMin(T* p, std::type_identity_t<T> v) {
  return ef_exchange(p, v < *p ? v : *p);
}
template <class T>
EF_UNOBSERVED T atomicExch(T* p, std::type_identity_t<T> v) {
  return ef_exchange(p, v);
}
template <class T>
EF_UNOBSERVED T atomicCAS(T* p, std::type_identity_t<T> compare, std::type_identity_t<T> v) {
  return ef_exchange(p, *p == compare ? v : *p);
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline int __clzll(unsigned long long x) { return x ? __builtin_clzll(x) : 64; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
template <class T>
T __ldg(const T* p) {
  return *p;
}
// Stores for other blocks, and loads of what they stored. A load finds NaN where no fence stands between it and the ticket, or flag, that
// told the block that the others are done.
template <class T>
void __stcg(T* p, T value) {
  *p = value;
  ef::emulation::hold_back(p, sizeof(T));
}
template <class T>
T __ldcg(const T* p) {
  T value = *p;
  if (!ef::emulation::sees_others()) std::memset(&value, 0xff, sizeof(T));
  return value;
}
template <class T>
T min(T a, std::type_identity_t<T> b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, std::type_identity_t<T> b) {
  return a < b ? b : a;
}

namespace ef {
template <typename T>
T* shared_memory() {
  return reinterpret_cast<T*>(emulation::running->shared.data());
}

template <class... Params>
int64_t resident_blocks(void (*kernel)(Params...), int threads, size_t shared_bytes) {
  using namespace emulation;
  return multiprocessors * (blocks_that_fit ? blocks_that_fit(symbol_of(reinterpret_cast<void*>(kernel)), threads, shared_bytes) : 4);
}

template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, Cuda, Args... args) {
  const auto thread = [kernel, ... params = static_cast<Params>(args)] { kernel(params...); };
  const auto run = [=] {
    emulation::run_launch(
        name, reinterpret_cast<void*>(kernel), grid, block, shared_bytes, [](void* f) { (*static_cast<const decltype(thread)*>(f))(); },
        const_cast<void*>(static_cast<const void*>(&thread)));
  };
  emulation::capture ? emulation::captured.push_back(run) : run();
}
}  // namespace ef
