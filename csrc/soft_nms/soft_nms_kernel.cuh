// Soft non-maximum suppression; formulas in soft_nms_math.h. A block owns an image, a thread every kThreads-th of its boxes and their
// scores, in shared memory where they fit. A step: the block finds the best score (of equal ones the lowest index), then each thread
// decays its boxes of that class and meanwhile finds its own best for the next step. One barrier a step: the places where the warps
// leave their best alternate. Bytes: the scores and labels once a step, and the boxes of the class; all from shared memory and L1 / L2.
#pragma once
#include "../common/launch.cuh"
#include "../common/vec.cuh"
#include "soft_nms.h"
#include "soft_nms_math.h"

namespace ef::soft_nms {
inline constexpr int kThreads = 512;
inline constexpr int kWarps = kThreads / kWarpSize;

template <typename A>
struct Best {
  A score;
  int index;
};
template <typename A>
__device__ Best<A> better_of(const Best<A>& a, const Best<A>& b) {
  return b.score > a.score || (b.score == a.score && b.index < a.index) ? b : a;
}
template <typename A>
__device__ Best<A> warp_best(Best<A> best) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    best = better_of(best, {__shfl_xor_sync(0xffffffffu, best.score, mask), __shfl_xor_sync(0xffffffffu, best.index, mask)});
  }
  return best;
}

template <bool kGaussian, bool kAligned, typename scalar_t>
__global__ void __launch_bounds__(kThreads, 1) soft_nms_kernel(Problem<scalar_t> in, Decay<acc_t<scalar_t>> decay,
                                                               acc_t<scalar_t>* workspace,  // [batch, n], or null: shared memory
                                                               Detections<scalar_t> out) {
  using A = acc_t<scalar_t>;
  Best<A>* warp_bests = shared_memory<Best<A>>();  // [2, kWarps]
  const int64_t image = blockIdx.x, first_row = image * in.max_detections;
  A* current = workspace ? workspace + image * in.n : reinterpret_cast<A*>(warp_bests + 2 * kWarps);  // [n]
  const scalar_t* boxes = in.boxes + image * in.n * 4;
  const int64_t* labels = in.labels + image * in.n;
  const int n = int(in.n), max_detections = int(in.max_detections), lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;

  Best<A> mine{out_score<A>(), n};
  for (int i = threadIdx.x; i < n; i += kThreads) {
    current[i] = start_score(A(in.scores[image * in.n + i]), decay);
    mine = better_of(mine, {current[i], i});
  }
  int found = 0;
  for (; found < max_detections; ++found) {
    Best<A>* bests = warp_bests + found % 2 * kWarps;
    mine = warp_best(mine);
    if (lane == 0) bests[warp] = mine;
    __syncthreads();
    const Best<A> best = warp_best(bests[lane % kWarps]);
    if (!(best.score > out_score<A>())) break;
    const Box<A> box = load_box<kAligned>(boxes, best.index);
    const int64_t label = labels[best.index];
    if (threadIdx.x == 0) {
      out.set(first_row + found, boxes + best.index * int64_t(4), static_cast<scalar_t>(best.score), label, best.index);
    }
    mine = {out_score<A>(), n};
    for (int i = threadIdx.x; i < n; i += kThreads) {
      A score = current[i];
      if (!(score > out_score<A>())) continue;
      if (i == best.index) {
        current[i] = out_score<A>();
        continue;
      }
      if (labels[i] == label) {
        const Box<A> other = load_box<kAligned>(boxes, i);
        const A inter = intersection(box, other);
        if (may_decay(inter, decay)) {
          score = decayed_score<kGaussian>(score, rounded_quotient(inter, (box.area + other.area) - inter), decay);
          current[i] = score;
        }
      }
      mine = better_of(mine, {score, i});
    }
  }
  for (int k = found + int(threadIdx.x); k < max_detections; k += kThreads) out.clear(first_row + k);
  if (threadIdx.x == 0) out.counts[image] = found;
}
}  // namespace ef::soft_nms
