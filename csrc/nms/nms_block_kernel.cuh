// A block goes through one set of boxes in score order, a window at a time: a thread per candidate, which it keeps in registers. A
// thread first tests its candidate against the boxes kept in earlier windows; then tile after tile of the window is resolved, and the
// candidates behind it are tested against what the tile kept. One barrier a tile. The work is n x kept, and ends with the last box
// wanted; of the mask of overlaps only two tiles exist, in shared memory. Bytes: every input once, as far as it is looked at.
// nms_small_kernel: boxes sorted by class and score, so few that the one block beats the chain of nms_kernel.
// nms_padded_kernel: a block per image; its outputs in score order.
#pragma once
#include "../common/launch.cuh"
#include "../common/vec.cuh"
#include "nms.h"
#include "nms_tile.cuh"

namespace ef::nms {
inline constexpr int kWindow = 512;  // candidates, and threads of a block

struct TileRows {
  Word rows[kTile];
  unsigned alive[kTile / kWarpSize];
};

// Goes through candidates 0 .. n - 1 until `max_kept` are kept; returns how many are.
//   load(i, candidate): fills it in, or says false if it takes no part      ends(i): no candidate after i takes part
//   keep(k, i): candidate i is kept as number k; called by the thread that loaded it
template <typename A, class Load, class Ends, class Keep>
__device__ int suppress_in_order(int64_t n, int max_kept, A threshold, Load load, Ends ends, Keep keep) {
  const int window = blockDim.x, thread = threadIdx.x, own_tile = thread / kTile;
  TileRows* tiles = shared_memory<TileRows>();                            // [2]: a warp may still read one while others fill the next
  Candidate<A>* candidates = reinterpret_cast<Candidate<A>*>(tiles + 2);  // [window]
  Candidate<A>* kept_before = candidates + window;                        // [min(n, max_kept)], if there is more than one window
  int found = 0;
  for (int64_t begin = 0; begin < n && found < max_kept; begin += window) {
    __syncthreads();  // the candidates of the window before are no longer read
    const int count = n - begin < window ? int(n - begin) : window;
    Candidate<A> own{};
    bool alive = thread < count && load(begin + thread, own);
    candidates[thread] = own;
    for (int k = 0; k < found && alive; ++k) alive = !suppresses(kept_before[k], own, threshold);
    __syncthreads();
    for (int tile = 0; tile * kTile < count && found < max_kept; ++tile) {
      TileRows& shared = tiles[tile % 2];
      const Candidate<A>* first = candidates + tile * kTile;
      if (own_tile == tile) {
        const unsigned bits = __ballot_sync(0xffffffffu, alive);
        if (thread % kWarpSize == 0) shared.alive[thread / kWarpSize % 2] = bits;
      }
      fill_rows(first, count - tile * kTile < kTile ? count - tile * kTile : kTile, threshold, shared.rows);
      __syncthreads();
      const Word kept = resolve(shared.rows, Word(shared.alive[0]) | Word(shared.alive[1]) << kWarpSize, max_kept - found);
      if (own_tile == tile && kept >> (thread % kTile) & 1) {
        const int k = found + __popcll(kept & ((Word(1) << (thread % kTile)) - 1));
        if (n > window) kept_before[k] = own;
        keep(k, begin + thread);
      }
      if (own_tile > tile) {
        for (Word left = kept; left && alive; left &= left - 1) {
          alive = !suppresses(first[__ffsll(static_cast<long long>(left)) - 1], own, threshold);
        }
      }
      found += __popcll(kept);
    }
    if (ends(begin + count - 1)) break;
  }
  return found;
}

template <bool kAligned, typename scalar_t>
__global__ void __launch_bounds__(kWindow) nms_small_kernel(Problem<scalar_t> in, acc_t<scalar_t> threshold,
                                                            bool* __restrict__ keep) {  // [batch, n]
  using A = acc_t<scalar_t>;
  const int64_t first = blockIdx.x * in.n;
  suppress_in_order<A>(
      in.n, int(in.n), threshold,
      [&](int64_t i, Candidate<A>& candidate) {
        candidate = {load_box<kAligned>(in.boxes, first + i), in.labels ? in.labels[first + i] : 0};
        keep[first + i] = false;
        return true;
      },
      [](int64_t) { return false; }, [&](int, int64_t i) { keep[first + i] = true; });
}

template <bool kAligned, typename scalar_t>
__global__ void __launch_bounds__(kWindow)
    nms_padded_kernel(BatchProblem<scalar_t> in, acc_t<scalar_t> threshold, Detections<scalar_t> out) {
  using A = acc_t<scalar_t>;
  const int64_t first = blockIdx.x * in.n, first_row = blockIdx.x * in.max_detections;
  const int max_kept = int(in.max_detections);
  const scalar_t* scores = in.ranked_scores + first;
  const auto score_of = [&](int64_t rank) { return static_cast<double>(static_cast<A>(scores[rank])); };
  int64_t index = 0;  // of the box this thread looks at
  const int found = suppress_in_order<A>(
      in.n, max_kept, threshold,
      [&](int64_t rank, Candidate<A>& candidate) {
        if (in.has_score_threshold && !(score_of(rank) > in.score_threshold)) return false;
        index = in.order[first + rank];
        if (index < 0 || index >= in.n) return false;
        candidate = {load_box<kAligned>(in.boxes, first + index), in.labels[first + index]};
        return true;
      },
      [&](int64_t rank) { return in.has_score_threshold && score_of(rank) <= in.score_threshold; },
      [&](int k, int64_t rank) { out.set(first_row + k, in.boxes + (first + index) * 4, scores[rank], in.labels[first + index], index); });
  for (int k = found + int(threadIdx.x); k < max_kept; k += blockDim.x) out.clear(first_row + k);
  if (threadIdx.x == 0) out.counts[blockIdx.x] = found;
}
}  // namespace ef::nms
