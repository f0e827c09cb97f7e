// Non-maximum suppression; formulas in nms_math.h. Candidates come in score order, in tiles of 64, one bit each of a 64-bit word.
// A tile is resolved in three steps: every candidate is tested against the boxes kept before the tile, four threads a candidate;
// a warp per row ballots which candidates of the tile overlap; one warp walks the 64 rows, best candidate first.
// nms_kernel: a block owns a tile of the boxes sorted by class and score. It follows the tiles of its class before it as they publish
// what they keep, so all multiprocessors work on one class, and classes on their own do not wait. A tile takes its number from a
// counter: those before it have started, so waiting for them ends. Memory: 16 bytes a tile; no n x n mask.
// nms_padded_kernel: a block owns an image, keeps its list in shared memory and stops at max_detections.
#pragma once
#include "../common/box.cuh"
#include "../common/reduce.cuh"
#include "../common/vec.cuh"
#include "nms.h"
#include "nms_math.h"

namespace ef::nms {
using Word = unsigned long long;
inline constexpr int kTile = 64;
inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / kWarpSize;
inline constexpr int kHelpers = kThreads / kTile;  // threads that share the tests of one candidate

template <typename A>
struct Kept {
  Box<A> box;
  int64_t label;
};

// Shared memory of a block.
template <typename A>
struct Tile {
  Kept<A> candidates[kTile];
  Word rows[kTile];       // bit j of row i: candidate i, if kept, suppresses candidate j > i
  Word keep;              // what came out
  Word number;            // of the tile
  int64_t first;          // the first tile that may hold boxes of the same class
  unsigned valid[2];      // candidates that take part
  unsigned finished[2];   // candidates at or below the score threshold: no later one takes part
  unsigned dead[kWarps];  // bits of the candidates a warp found suppressed; even warps have 0-31, odd ones 32-63
};

template <typename A>
__device__ bool suppresses(const Kept<A>& kept, const Kept<A>& candidate, A threshold) {
  if (kept.label != candidate.label) return false;
  const A inter = intersection(kept.box, candidate.box);
  if (inter == A(0) && threshold >= A(0)) return false;  // 0 / x is 0 or NaN: spares most divisions
  return rounded_quotient(inter, (kept.box.area + candidate.box.area) - inter) > threshold;
}

// Fills tile.dead from each thread's finding about candidate threadIdx.x % kTile.
template <typename A>
__device__ void publish_dead(Tile<A>& tile, bool dead) {
  const unsigned bits = __ballot_sync(0xffffffffu, dead);
  if (threadIdx.x % kWarpSize == 0) tile.dead[threadIdx.x / kWarpSize] = bits;
}

// Fills tile.rows of `count` candidates.
template <typename A>
__device__ void fill_rows(Tile<A>& tile, int count, A threshold) {
  const int lane = threadIdx.x % kWarpSize;
  for (int i = threadIdx.x / kWarpSize; i < count; i += kWarps) {
    Word row = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int j = lane + half * kWarpSize;
      const bool bit = j > i && j < count && suppresses(tile.candidates[i], tile.candidates[j], threshold);
      row |= Word(__ballot_sync(0xffffffffu, bit)) << (half * kWarpSize);
    }
    if (lane == 0) tile.rows[i] = row;
  }
}

// One warp: walks the candidates that are left, best first, and keeps at most `room`. The same in every lane.
template <typename A>
__device__ Word resolve(const Tile<A>& tile, int room) {
  Word dead = 0, keep = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) dead |= Word(tile.dead[w]) << (w % 2 * kWarpSize);
  Word left = (Word(tile.valid[0]) | Word(tile.valid[1]) << kWarpSize) & ~dead;
  for (; left && room > 0; --room) {
    const int i = __ffsll(static_cast<long long>(left)) - 1;
    keep |= Word(1) << i;
    left &= ~(tile.rows[i] | Word(1) << i);
  }
  return keep;
}

// What a tile keeps, in two words of 32 bits and a mark that they are there: flag and bits arrive in one load, which needs no fence.
inline constexpr Word kPublished = Word(1) << 32;
__device__ inline unsigned wait_for(const Word* word) {
  Word value;
  do {
    value = *static_cast<const volatile Word*>(word);
  } while (!(value & kPublished));
  return static_cast<unsigned>(value);
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
                                                       Word* published,             // [tiles, 2]
                                                       bool* __restrict__ keep) {   // [n]
  using A = acc_t<scalar_t>;
  Tile<A>& tile = *shared_memory<Tile<A>>();
  if (threadIdx.x == 0) tile.number = atomicAdd(counter, Word(1));
  __syncthreads();
  const int64_t number = static_cast<int64_t>(tile.number), begin = number * kTile;
  const int count = in.n - begin < kTile ? int(in.n - begin) : kTile;
  if (threadIdx.x < kTile) {
    const int64_t i = begin + threadIdx.x;
    const bool valid = i < in.n;
    if (valid) tile.candidates[threadIdx.x] = {load_box<kAligned>(in.boxes, i), in.labels ? in.labels[i] : 0};
    const unsigned bits = __ballot_sync(0xffffffffu, valid);
    if (threadIdx.x % kWarpSize == 0) tile.valid[threadIdx.x / kWarpSize] = bits;
    if (threadIdx.x == 0) tile.first = in.labels ? lower_bound(in.labels, begin, in.labels[begin]) / kTile : 0;
  }
  __syncthreads();
  fill_rows(tile, count, threshold);

  const int candidate = threadIdx.x % kTile, helper = threadIdx.x / kTile;
  constexpr int kSlice = kTile / kHelpers;  // the boxes of an earlier tile that one helper tests
  static_assert(kWarpSize % kSlice == 0);
  bool dead = candidate >= count;
  for (int64_t earlier = tile.first; earlier < number; ++earlier) {
    if (__all_sync(0xffffffffu, dead)) break;
    const int64_t position = earlier * kTile + helper * kSlice;
    const unsigned kept = wait_for(published + earlier * 2 + helper * kSlice / kWarpSize) >> (helper * kSlice % kWarpSize);
    for (unsigned left = kept & ((1u << kSlice) - 1); left; left &= left - 1) {
      const int64_t i = position + __ffs(static_cast<int>(left)) - 1;
      const Kept<A> box{load_box<kAligned>(in.boxes, i), in.labels ? in.labels[i] : 0};
      dead = dead || suppresses(box, tile.candidates[candidate], threshold);
    }
  }
  publish_dead(tile, dead);
  __syncthreads();
  if (threadIdx.x < kWarpSize) {
    const Word kept = resolve(tile, kTile);
    if (threadIdx.x == 0) tile.keep = kept;
    if (threadIdx.x < 2) {
      *static_cast<volatile Word*>(published + number * 2 + threadIdx.x) = kPublished | ((kept >> (threadIdx.x * kWarpSize)) & 0xffffffffu);
    }
  }
  __syncthreads();
  if (threadIdx.x < count) keep[begin + threadIdx.x] = tile.keep >> threadIdx.x & 1;
}

// Loads the candidates of ranks begin .. begin + kTile - 1 and says which take part.
template <bool kAligned, typename scalar_t>
__device__ void load_ranked(Tile<acc_t<scalar_t>>& tile, const BatchProblem<scalar_t>& in, int64_t image, int64_t begin) {
  const int64_t rank = begin + threadIdx.x;
  bool valid = rank < in.n, finished = false;
  if (valid && in.has_score_threshold) {
    const double score = static_cast<double>(static_cast<acc_t<scalar_t>>(in.ranked_scores[image * in.n + rank]));
    valid = score > in.score_threshold;
    finished = score <= in.score_threshold;
  }
  if (valid) {
    const int64_t i = image * in.n + in.order[image * in.n + rank];
    tile.candidates[threadIdx.x] = {load_box<kAligned>(in.boxes, i), in.labels[i]};
  }
  const unsigned valid_bits = __ballot_sync(0xffffffffu, valid), finished_bits = __ballot_sync(0xffffffffu, finished);
  if (threadIdx.x % kWarpSize == 0) {
    tile.valid[threadIdx.x / kWarpSize] = valid_bits;
    tile.finished[threadIdx.x / kWarpSize] = finished_bits;
  }
}

template <bool kAligned, typename scalar_t>
__global__ void __launch_bounds__(kThreads) nms_padded_kernel(BatchProblem<scalar_t> in, acc_t<scalar_t> threshold,
                                                              Kept<acc_t<scalar_t>>* lists,  // [batch, slots], or null: shared memory
                                                              int slots, BatchDetections<scalar_t> out) {
  using A = acc_t<scalar_t>;
  Tile<A>& tile = *shared_memory<Tile<A>>();
  const int64_t image = blockIdx.x, first_row = image * in.max_detections;
  Kept<A>* list = lists ? lists + image * int64_t(slots) : reinterpret_cast<Kept<A>*>(&tile + 1);
  const int candidate = threadIdx.x % kTile, helper = threadIdx.x / kTile;
  const int most = int(in.max_detections);
  int found = 0;
  for (int64_t begin = 0; begin < in.n && found < most; begin += kTile) {
    if (threadIdx.x < kTile) load_ranked<kAligned>(tile, in, image, begin);
    __syncthreads();
    const bool valid = tile.valid[candidate / kWarpSize] >> (candidate % kWarpSize) & 1;
    bool dead = !valid;
    for (int k = helper; k < found && !dead; k += kHelpers) dead = suppresses(list[k], tile.candidates[candidate], threshold);
    publish_dead(tile, dead);
    fill_rows(tile, in.n - begin < kTile ? int(in.n - begin) : kTile, threshold);
    const bool finished = tile.finished[0] | tile.finished[1];
    __syncthreads();
    if (threadIdx.x < kWarpSize) {
      const Word keep = resolve(tile, most - found);
      if (threadIdx.x == 0) tile.keep = keep;
    }
    __syncthreads();
    const Word keep = tile.keep;
    if (threadIdx.x < kTile && keep >> threadIdx.x & 1) {
      const int k = found + __popcll(keep & ((Word(1) << threadIdx.x) - 1));
      const int64_t row = first_row + k, rank = image * in.n + begin + threadIdx.x, i = in.order[rank];
      list[k] = tile.candidates[threadIdx.x];
      for (int c = 0; c < 4; ++c) out.boxes[row * 4 + c] = in.boxes[(image * in.n + i) * 4 + c];
      out.scores[row] = in.ranked_scores[rank];
      out.labels[row] = tile.candidates[threadIdx.x].label;
      out.indices[row] = i;
    }
    found += __popcll(keep);
    if (finished) break;
  }
  for (int k = found + int(threadIdx.x); k < most; k += kThreads) {
    const int64_t row = first_row + k;
    for (int c = 0; c < 4; ++c) out.boxes[row * 4 + c] = scalar_t(0.f);
    out.scores[row] = scalar_t(0.f);
    out.labels[row] = out.indices[row] = -1;
  }
  if (threadIdx.x == 0) out.counts[image] = found;
}
}  // namespace ef::nms
