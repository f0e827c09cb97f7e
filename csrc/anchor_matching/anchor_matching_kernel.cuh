// Targets of all images without an IoU matrix; formulas in anchor_matching_math.h.
// A thread owns one anchor, a warp 32 consecutive ones and their bounds (Group). Each lane tests one box of the image against the
// bounds; a ballot tells which boxes the warp must look at, one after the other, lane by lane. Neighbors in the list of anchors are
// neighbors in the image, so that most boxes are out of question for most warps. No shared memory, no barrier.
// best_kernel:  best[image, box] = the highest IoU of the box with any anchor, as the bits of a non-negative number, which order as it.
// first_kernel: first[image, box] = count - the first anchor that has it. Both are maxima of integers: the order does not matter.
// write_kernel: each anchor's own best box, forced or not, its label and its deltas.
// Bytes per anchor and image, float: 24 written; anchors and boxes (16 each, all images share the anchors) come from cache.
// Operations: a bound per warp and box, an IoU per anchor only where the bound allows it. A matrix would be 4 bytes per pair instead.
#pragma once
#include "../common/launch.cuh"
#include "../common/vec.cuh"
#include "anchor_matching.h"

namespace ef::anchor_matching {
using Word = unsigned long long;
inline constexpr int kThreads = 256;
inline constexpr unsigned kAllLanes = 0xffffffffu;

template <typename T>
__device__ Word bits_of(T x) {
  Word bits = 0;
  memcpy(&bits, &x, sizeof(T));
  return bits;
}
template <typename T>
__device__ T number_of(Word bits) {
  T x;
  memcpy(&x, &bits, sizeof(T));
  return x;
}

template <typename T>
__device__ Box<T> load_box(const T* boxes, int64_t i) {
  const T* b = boxes + i * 4;
  return box_of(b[0], b[1], b[2], b[3]);
}

template <typename T>
__device__ T from_lane_xor(T x, int mask) {
  return __shfl_xor_sync(kAllLanes, x, mask);
}

// This thread's anchor, and the bounds of its warp's.
template <typename T>
struct Own {
  int64_t index, warp_first;
  int lane;
  bool there;
  Box<T> anchor;
  Group<T> group;

  __device__ explicit Own(const Problem<T>& in)
      : index(int64_t(blockIdx.x) * blockDim.x + threadIdx.x), lane(threadIdx.x % kWarpSize), there(index < in.count) {
    warp_first = index - lane;
    anchor = there ? load_box(in.anchors, index) : Box<T>{};
    group = empty_group<T>();
    if (there) group = join(group_of(anchor), group);
#pragma unroll
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
      const Box<T>& hull = group.hull;
      const Group<T> other{{from_lane_xor(hull.x1, mask), from_lane_xor(hull.y1, mask), from_lane_xor(hull.x2, mask),
                            from_lane_xor(hull.y2, mask), from_lane_xor(hull.area, mask)},
                           from_lane_xor(group.largest, mask)};
      group = join(other, group);
    }
  }
  // IoU of the anchor with a box; 0 where it is not a number.
  __device__ T overlap(const Box<T>& box) const {
    const T v = there ? iou(anchor, box) : T(0);
    return v > T(0) ? v : T(0);
  }
};

// Calls visit(row, box), with all lanes together and in ascending order, for the objects of an image that wanted(row, bound) picks.
template <typename T, class Wanted, class Visit>
__device__ void for_each_box(const Problem<T>& in, int64_t image, const Own<T>& own, Wanted&& wanted, Visit&& visit) {
  const int64_t rows = in.rows(image), first = image * in.max_boxes;
  for (int64_t begin = 0; begin < rows; begin += kWarpSize) {
    const int64_t row = begin + own.lane;
    const bool is_object = row < rows && in.is_object(image, row);
    const bool pick = is_object && wanted(row, iou_bound(own.group, load_box(in.boxes, first + row)));
    for (unsigned picked = __ballot_sync(kAllLanes, pick); picked; picked &= picked - 1) {
      const int64_t chosen = begin + __ffs(int(picked)) - 1;
      visit(chosen, load_box(in.boxes, first + chosen));
    }
  }
}

template <typename T>
__global__ void best_kernel(Problem<T> in,
                            Word* best) {  // [batch, max_boxes], zeros at first
  const Own<T> own(in);
  for (int64_t image = blockIdx.y; image < in.batch; image += gridDim.y) {
    // Other warps raise `best` meanwhile. An old value only lets more boxes through.
    volatile Word* mine = best + image * in.max_boxes;
    const auto wanted = [&](int64_t row, T bound) { return bound != T(0) && may_reach(bound, number_of<T>(mine[row])); };
    for_each_box(in, image, own, wanted, [&](int64_t row, const Box<T>& box) {
      T highest = own.overlap(box);
#pragma unroll
      for (int mask = kWarpSize / 2; mask > 0; mask /= 2) highest = larger(from_lane_xor(highest, mask), highest);
      if (own.lane == 0 && bits_of(highest) > mine[row]) atomicMax(best + image * in.max_boxes + row, bits_of(highest));
    });
  }
}

template <typename T>
__global__ void first_kernel(Problem<T> in,
                             const Word* __restrict__ best,  // [batch, max_boxes]
                             Word* first) {                  // [batch, max_boxes], zeros at first
  const Own<T> own(in);
  for (int64_t image = blockIdx.y; image < in.batch; image += gridDim.y) {
    const Word* mine = best + image * in.max_boxes;
    const auto wanted = [&](int64_t row, T bound) { return mine[row] != 0 && may_reach(bound, number_of<T>(mine[row])); };
    for_each_box(in, image, own, wanted, [&](int64_t row, const Box<T>& box) {
      const unsigned ties = __ballot_sync(kAllLanes, bits_of(own.overlap(box)) == mine[row]);
      if (ties && own.lane == 0) atomicMax(first + image * in.max_boxes + row, Word(in.count - (own.warp_first + __ffs(int(ties)) - 1)));
    });
  }
}

// What one anchor has seen of an image.
template <typename T>
struct Seen {
  T highest = -1;
  int64_t match = -1, forced = -1;
  bool tied = false;
};

template <ForcedMatch kForce, typename T>
__device__ Seen<T> look(const Problem<T>& in, int64_t image, const Own<T>& own, const Word* best, const Word* first) {
  // The anchor a box forces; one that overlaps nothing forces the first.
  const auto forces = [&](int64_t row) { return first[row] ? in.count - int64_t(first[row]) : 0; };
  const auto wanted = [&](int64_t row, T bound) {
    if constexpr (kForce == ForcedMatch::kTies) return bound != T(0) || best[row] == 0;
    if constexpr (kForce == ForcedMatch::kFirst) {
      const int64_t lane = forces(row) - own.warp_first;
      if (lane >= 0 && lane < kWarpSize) return true;
    }
    return may_reach(bound, in.negative);
  };
  Seen<T> seen;
  for_each_box(in, image, own, wanted, [&](int64_t row, const Box<T>& box) {
    const T overlap = own.overlap(box);
    if (overlap > seen.highest) {
      seen.highest = overlap;
      seen.match = row;
    }
    if constexpr (kForce == ForcedMatch::kTies) seen.tied |= bits_of(overlap) == best[row];
    if constexpr (kForce == ForcedMatch::kFirst) {
      if (seen.forced < 0 && forces(row) == own.index) seen.forced = row;
    }
  });
  if (kForce == ForcedMatch::kTies && seen.tied && seen.highest == T(0)) {  // of boxes that overlap nothing, some were not looked at
    seen.match = 0;
    while (!in.is_object(image, seen.match)) ++seen.match;
  }
  return seen;
}

template <ForcedMatch kForce, typename T>
__global__ void write_kernel(Problem<T> in,
                             const Word* __restrict__ best,   // [batch, max_boxes], for kTies
                             const Word* __restrict__ first,  // [batch, max_boxes], for kFirst
                             Targets<T> out) {
  const Own<T> own(in);
  for (int64_t image = blockIdx.y; image < in.batch; image += gridDim.y) {
    const Seen<T> seen = look<kForce>(in, image, own, best + image * in.max_boxes, first + image * in.max_boxes);
    const int64_t row = seen.forced >= 0                           ? seen.forced
                        : seen.tied || seen.highest >= in.positive ? seen.match
                        : seen.highest >= in.negative              ? -2
                                                                   : -1;
    const unsigned positives = __ballot_sync(kAllLanes, own.there && row >= 0);
    if (positives && own.lane == 0) atomicAdd(reinterpret_cast<Word*>(out.positives) + image, Word(__popc(positives)));
    if (!own.there) continue;
    const int64_t place = image * in.count + own.index;
    Vec<T, 4> deltas{};
    if (row >= 0) encode(in.coder, load_box(in.boxes, image * in.max_boxes + row), own.anchor, deltas.v);
    out.labels[place] = row >= 0 ? in.labels[image * in.max_boxes + row] : row;
    constexpr int kSize = kVecSize<T> < 4 ? kVecSize<T> : 4;
#pragma unroll
    for (int k = 0; k < 4; k += kSize) store_vec<kSize>(out.deltas + place * 4 + k, load_vec<kSize>(deltas.v + k));
  }
}
}  // namespace ef::anchor_matching
