// Boxes [n, 4] read with the widest loads that their alignment allows.
#pragma once
#include "box.h"
#include "dtypes.h"
#include "launch.cuh"
#include "vec.cuh"

namespace ef {
template <bool kAligned, typename scalar_t>
__device__ Box<acc_t<scalar_t>> load_box(const scalar_t* boxes, int64_t i) {
  using A = acc_t<scalar_t>;
  constexpr int kSize = !kAligned ? 1 : kVecSize<scalar_t> < 4 ? 2 : 4;
  A corner[4];
#pragma unroll
  for (int k = 0; k < 4; k += kSize) {
    const Vec<scalar_t, kSize> part = load_vec<kSize>(boxes + i * 4 + k);
#pragma unroll
    for (int j = 0; j < kSize; ++j) corner[k + j] = A(part.v[j]);
  }
  return box_of(corner[0], corner[1], corner[2], corner[3]);
}
}  // namespace ef
