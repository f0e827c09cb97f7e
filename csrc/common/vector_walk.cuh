// A thread's walk over vectors that lie `stride` apart in tensors of one shape, with several of each on their way at once.
#pragma once
#include "vec.cuh"

namespace ef {
// What a thread walks over: values first, first + stride, ... below end, kVec neighbors at each.
struct Strided {
  int64_t first, end, stride;
};
// Calls use(i, vectors) with the packed vector at i of each tensor. Four vectors are asked for together, the first four before begin(), the
// next at the end of a round of the loop: nvcc does not move a load into the next round, and so not back to its use. More would cost a
// block on the multiprocessor where constants and sums take registers.
template <int kVec, int kTensors, typename T, class Begin, class Use>
__device__ void for_each_vector(const Strided& walk, const T* const (&tensors)[kTensors], Begin&& begin, Use&& use) {
  constexpr int kBatch = 4 / kTensors;
  Packed<T, kVec> held[kBatch][kTensors];
  const auto load = [&](int64_t i) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b, i += walk.stride) {
      if (i >= walk.end) continue;
#pragma unroll
      for (int t = 0; t < kTensors; ++t) held[b][t] = load_packed<kVec>(tensors[t] + i);
    }
  };
  const auto use_all = [&]<bool kWhole>(int64_t i) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b, i += walk.stride) {
      if (kWhole || i < walk.end) use(i, held[b]);
    }
  };
  int64_t i = walk.first;
  load(i);
  begin();
  for (; i + (kBatch - 1) * walk.stride < walk.end; i += kBatch * walk.stride) {
    use_all.template operator()<true>(i);  // without a branch between them: they wait for each other's arithmetic less
    load(i + kBatch * walk.stride);
  }
  use_all.template operator()<false>(i);
}
}  // namespace ef
