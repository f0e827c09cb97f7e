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

// Sum over the block of one or two dimensions, valid in its first thread. `scratch` holds one T per warp; the number of threads is a
// multiple of 32 and at most 1024.
template <typename T>
__device__ T block_sum(T value, T* scratch) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  value = warp_sum(value);
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  if (warp == 0) value = warp_sum(lane < threads / kWarpSize ? scratch[lane] : T(0));
  return value;
}
}  // namespace ef
