// The chain of tiles of csrc/nms, without boxes: a block waits for the words of all tiles of its chain before its own, resolves its own 64
// candidates and publishes a word. Tickets as there: who waits, waits for blocks that have begun. What differs is who asks:
//
//   every warp              8 warps of each resident block read one word in L2 until it is there, as csrc does
//   one thread              one thread a block does, and tells its block through shared memory, behind a barrier
//   one thread, sleeping    the same, 32 ns apart
//
// The tests of overlap between tiles are left out: with many boxes kept they hide a part of the wait.
#pragma once
#include "../../csrc/nms/nms_kernel.cuh"
#include "launch_plan.h"

namespace ef::variants {
using nms::Word;
enum class Poller { kEveryWarp, kThread, kSleepingThread };

// Some 64 bits of (tile, row); tests/benchmarks/test_variants.py has the same.
EF_HD Word mixed(Word x) {
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ x >> 27) * 0x94d049bb133111ebull;
  return x ^ x >> 31;
}
// The later candidates of a tile that candidate i suppresses: one in eight.
EF_HD Word row_of(Word tile, int i) {
  const Word first = (tile * nms::kTile + i) * 3 + 1;
  return mixed(first) & mixed(first + 1) & mixed(first + 2) & (i == nms::kTile - 1 ? 0 : ~Word(0) << (i + 1));
}

struct ChainTile {
  Word rows[nms::kTile];
  Word number;
  Word heard[2];  // alternates, so that one barrier a word is enough
};

template <bool kSleeps>
__device__ Word wait_alone(const Word* published) {
  Word keep = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Word value = *static_cast<const volatile Word*>(published + half);
    while (!(value & nms::kPublished)) {
#if defined(__CUDA_ARCH__)
      if constexpr (kSleeps) __nanosleep(32);
#endif
      value = *static_cast<const volatile Word*>(published + half);
    }
    keep |= (value & 0xffffffffu) << (half * kWarpSize);
  }
  return keep;
}

template <Poller kPoller>
__global__ void __launch_bounds__(nms::kThreads) chain_kernel(int64_t steps, Word* __restrict__ counter,  // [1], zero
                                                              Word* published) {                          // [chains, steps, 2], zero
  ChainTile& tile = *shared_memory<ChainTile>();
  if (threadIdx.x == 0) tile.number = atomicAdd(counter, Word(1));
  __syncthreads();
  const int64_t chain = int64_t(tile.number) / steps, number = int64_t(tile.number) - chain * steps;
  published += chain * steps * 2;
  if (threadIdx.x < nms::kTile) tile.rows[threadIdx.x] = row_of(tile.number, threadIdx.x);
  Word suppressed = 0;
  for (int64_t earlier = 0; earlier < number; ++earlier) {
    Word kept;
    if constexpr (kPoller == Poller::kEveryWarp) {
      kept = nms::wait_for(published + earlier * 2);
    } else {
      Word& heard = tile.heard[earlier % 2];
      if (threadIdx.x == 0) heard = wait_alone<kPoller == Poller::kSleepingThread>(published + earlier * 2);
      __syncthreads();
      kept = heard;
    }
    suppressed = (suppressed << 1 | suppressed >> 63) ^ kept;
  }
  __syncthreads();
  if (threadIdx.x < kWarpSize) {
    const Word kept = nms::resolve(tile.rows, ~suppressed, nms::kTile);
    if (threadIdx.x < 2) {
      *static_cast<volatile Word*>(published + number * 2 + threadIdx.x) =
          nms::kPublished | (kept >> (threadIdx.x * kWarpSize) & 0xffffffffu);
    }
  }
}

// f(name, launch plan) for each variant, the plain one first.
template <class F>
void each_chain(int64_t chains, int64_t steps, F&& f) {
  const auto plan = [&]<Poller kPoller>() {
    return LaunchPlan{chain_kernel<kPoller>, dim3(unsigned(chains * steps)), dim3(nms::kThreads), sizeof(ChainTile)};
  };
  f("every warp", plan.template operator()<Poller::kEveryWarp>());
  f("one thread", plan.template operator()<Poller::kThread>());
  f("one thread, sleeping", plan.template operator()<Poller::kSleepingThread>());
}
}  // namespace ef::variants
