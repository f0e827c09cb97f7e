// Non-maximum suppression of boxes sorted by image, class and score, on all multiprocessors; formulas in nms_math.h. A block owns a tile
// of 64 boxes of an image. It tests them, four threads each, against what the tiles of its class before it keep, as those publish it;
// then it resolves its own and publishes. So pairs of one class only are compared, classes do not wait for each other, and tiles of one
// class work at the same time. A tile takes its number from a counter: those before it have started, so waiting for them ends.
// A chain of tiles can be no faster than its steps from one to the next: a tile's overlaps with the one right before it, which
// publishes last, are found before the wait. The work is n x kept of a class, and stops at the `max_kept` wanted of it.
// Memory: 16 bytes a tile; no n x n mask. Bytes: the inputs once, and what is kept once per later tile of the class, from L2.
#pragma once
#include "../common/launch.cuh"
#include "../common/vec.cuh"
#include "nms.h"
#include "nms_tile.cuh"

namespace ef::nms {
inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / kWarpSize;
inline constexpr int kHelpers = kThreads / kTile;  // threads that share the tests of one candidate
inline constexpr int kSlice = kTile / kHelpers;    // the boxes of an earlier tile that one of them tests

// Shared memory of a block.
template <typename A>
struct Tile {
  Candidate<A> candidates[kTile];
  Word rows[kTile];
  Word number;            // of the tile
  Word keep;              // what came out
  int64_t class_begin;    // where the class of the first candidate begins in the image
  unsigned dead[kWarps];  // bits of the candidates a warp found suppressed; even warps have 0-31, odd ones 32-63
};

// What a tile keeps, in two words of 32 bits and a mark that they are there: flag and bits arrive in one load, which needs no fence.
inline constexpr Word kPublished = Word(1) << 32;
__device__ inline Word wait_for(const Word* published) {
  Word keep = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Word value;
    do {
      value = *static_cast<const volatile Word*>(published + half);
    } while (!(value & kPublished));
    keep |= (value & 0xffffffffu) << (half * kWarpSize);
  }
  return keep;
}

// First position whose label is not below `label`.
__device__ inline int64_t lower_bound(const int64_t* labels, int64_t n, int64_t label) {
  int64_t begin = 0, end = n;
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (labels[middle] < label) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

template <bool kAligned, typename scalar_t>
__global__ void __launch_bounds__(kThreads) nms_kernel(Problem<scalar_t> in, acc_t<scalar_t> threshold,
                                                       Word* __restrict__ counter,  // [1]
                                                       Word* published,             // [batch, tiles, 2]
                                                       bool* __restrict__ keep) {   // [batch, n]
  using A = acc_t<scalar_t>;
  Tile<A>& tile = *shared_memory<Tile<A>>();
  if (threadIdx.x == 0) tile.number = atomicAdd(counter, Word(1));
  __syncthreads();
  const int64_t tiles = ceil_div(in.n, kTile), image = static_cast<int64_t>(tile.number) / tiles;
  const int64_t number = static_cast<int64_t>(tile.number) - image * tiles, begin = number * kTile;
  const int count = in.n - begin < kTile ? int(in.n - begin) : kTile;
  const int64_t* labels = in.labels ? in.labels + image * in.n : nullptr;
  const auto load = [&](int64_t i) -> Candidate<A> { return {load_box<kAligned>(in.boxes, image * in.n + i), labels ? labels[i] : 0}; };
  published += image * tiles * 2;

  if (threadIdx.x < count) tile.candidates[threadIdx.x] = load(begin + threadIdx.x);
  if (threadIdx.x == 0) tile.class_begin = labels ? lower_bound(labels, begin + 1, labels[begin]) : 0;
  __syncthreads();
  fill_rows(tile.candidates, count, threshold, tile.rows);

  const int candidate = threadIdx.x % kTile, helper = threadIdx.x / kTile;
  const Candidate<A> own = tile.candidates[candidate < count ? candidate : 0];
  const int64_t class_begin = tile.class_begin;
  bool dead = candidate >= count;
  unsigned before = 0;  // bit k: box k of this helper's slice of the tile right before would suppress the candidate
  if (class_begin < begin) {
#pragma unroll 4
    for (int k = 0; k < kSlice; ++k) {
      before |= unsigned(suppresses(load(begin - kTile + helper * kSlice + k), own, threshold)) << k;
    }
  }
  int64_t kept_before = 0;  // of the class
  for (int64_t earlier = class_begin / kTile; earlier < number; ++earlier) {
    if (__all_sync(0xffffffffu, dead)) break;
    Word kept = wait_for(published + earlier * 2);
    if (earlier * kTile < class_begin) kept &= ~Word(0) << (class_begin % kTile);
    unsigned left = static_cast<unsigned>(kept >> (helper * kSlice)) & ((1u << kSlice) - 1);
    if (earlier + 1 == number) {
      dead = dead || (left & before);
      left = 0;
    }
    for (; left; left &= left - 1) {
      dead = dead || suppresses(load(earlier * kTile + helper * kSlice + __ffs(static_cast<int>(left)) - 1), own, threshold);
    }
    kept_before += __popcll(kept);
    if (kept_before >= in.max_kept) {
      dead = dead || own.label == tile.candidates[0].label;
      break;
    }
  }
  const unsigned bits = __ballot_sync(0xffffffffu, dead);
  if (threadIdx.x % kWarpSize == 0) tile.dead[threadIdx.x / kWarpSize] = bits;
  __syncthreads();
  if (threadIdx.x < kWarpSize) {
    Word suppressed = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) suppressed |= Word(tile.dead[w]) << (w % 2 * kWarpSize);
    const Word kept = resolve(tile.rows, ~suppressed, kTile);
    if (threadIdx.x == 0) tile.keep = kept;
    if (threadIdx.x < 2) {
      *static_cast<volatile Word*>(published + number * 2 + threadIdx.x) = kPublished | ((kept >> (threadIdx.x * kWarpSize)) & 0xffffffffu);
    }
  }
  __syncthreads();
  if (threadIdx.x < count) keep[image * in.n + begin + threadIdx.x] = tile.keep >> threadIdx.x & 1;
}
}  // namespace ef::nms
