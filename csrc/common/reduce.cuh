// Sums over a warp and a block in a fixed order, so that every run gives the same bits.
#pragma once
#include "launch.cuh"

namespace ef {
inline constexpr int kWarpSize = 32;

template <typename T>
__device__ T warp_sum(T value) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(0xffffffffu, value, mask);
  return value;
}

// Sum over the block, valid in thread 0. `scratch` holds one T per warp; blockDim.x is a multiple of 32 and at most 1024.
template <typename T>
__device__ T block_sum(T value, T* scratch) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  value = warp_sum(value);
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  if (warp == 0) value = warp_sum(lane < int(blockDim.x) / kWarpSize ? scratch[lane] : T(0));
  return value;
}
}  // namespace ef
