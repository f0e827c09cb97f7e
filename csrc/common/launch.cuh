// Starting a kernel, its shared memory, and sums over a warp and a block. All shared memory is dynamic, so that the emulation can poison
// and bound it; sums have a fixed order, so that every run gives the same bits.
#pragma once
#include <stdexcept>
#include <string>

#include "platform.h"

#if defined(EF_EMULATE_CUDA)
#include "cuda_emulation.h"  // tests/emulation: launch and shared_memory, and what is CUDA's, for a host compiler
#endif

namespace ef {
inline void check_cuda(const char* name, cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(name) + ": launch failed: " + cudaGetErrorString(error));
}

#if !defined(EF_EMULATE_CUDA)
template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, Cuda device, Args... args) {
  if (shared_bytes > (48u << 10)) {  // above the default the kernel must opt in
    check_cuda(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  }
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(device.stream)>>>(static_cast<Params>(args)...);
  check_cuda(name, cudaGetLastError());
}

// How many blocks of a kernel the current device runs at the same time.
template <class... Params>
int64_t resident_blocks(void (*kernel)(Params...), int threads, size_t shared_bytes) {
  int device = 0, multiprocessors = 0, blocks = 0;
  check_cuda("device", cudaGetDevice(&device));
  check_cuda("device", cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  check_cuda("occupancy", cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes));
  return int64_t(blocks) * multiprocessors;
}

template <typename T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
}
#endif

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
