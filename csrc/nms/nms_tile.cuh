// What the kernels of non-maximum suppression share: a tile of 64 candidates in score order, one bit each of a 64-bit word. A warp per
// row ballots which later candidates of the tile a candidate overlaps; then a warp walks the rows, best candidate first.
#pragma once
#include "../common/launch.cuh"
#include "../common/vec.cuh"
#include "nms_math.h"

namespace ef::nms {
using Word = unsigned long long;
inline constexpr int kTile = 64;

template <typename A>
struct Candidate {
  Box<A> box;
  int64_t label;
};

template <typename A>
__device__ bool suppresses(const Candidate<A>& kept, const Candidate<A>& other, A threshold) {
  if (kept.label != other.label) return false;
  const A inter = intersection(kept.box, other.box);
  if (inter == A(0) && threshold >= A(0)) return false;  // 0 / x is 0 or NaN: spares most divisions
  return rounded_quotient(inter, (kept.box.area + other.box.area) - inter) > threshold;
}

// rows[i], bit j: candidate i, if kept, suppresses candidate j > i. By all warps of the block; `count` candidates are there.
template <typename A>
__device__ void fill_rows(const Candidate<A>* candidates, int count, A threshold, Word* rows) {
  const int lane = threadIdx.x % kWarpSize;
  const Candidate<A> low = candidates[lane < count ? lane : 0], high = candidates[lane + kWarpSize < count ? lane + kWarpSize : 0];
  for (int i = threadIdx.x / kWarpSize; i < count; i += blockDim.x / kWarpSize) {
    const Candidate<A> own = candidates[i];
    const Word low_bits = __ballot_sync(0xffffffffu, lane > i && lane < count && suppresses(own, low, threshold));
    const Word high_bits = __ballot_sync(0xffffffffu, lane + kWarpSize > i && lane + kWarpSize < count && suppresses(own, high, threshold));
    if (lane == 0) rows[i] = low_bits | high_bits << kWarpSize;
  }
}

// Walks the candidates in `left`, best first, and keeps at most `room`. The same in every thread that calls it.
__device__ inline Word resolve(const Word* rows, Word left, int room) {
  Word keep = 0;
  for (; left && room > 0; --room) {
    const int i = __ffsll(static_cast<long long>(left)) - 1;
    keep |= Word(1) << i;
    left &= ~(rows[i] | Word(1) << i);
  }
  return keep;
}
}  // namespace ef::nms
