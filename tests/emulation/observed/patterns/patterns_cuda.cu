// Kernels whose requests are known by counting: one warp, and one request of each kind.
#include "../../../../csrc/common/last_block.cuh"
#include "../../../../csrc/common/launch.cuh"
#include "../../../../csrc/common/vec.cuh"

namespace ef {
template <typename T, int kVec>
__global__ void copy_kernel(const T* x, T* y, int stride) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  store_vec<kVec>(y + i * kVec, load_vec<kVec>(x + i * kVec * stride));
}

// Each thread reads a row of a tile [32, width] that the warp has written column by column: the reads meet in one bank or in 32.
__global__ void transpose_kernel(float* y, int width) {
  float* tile = shared_memory<float>();
  for (int row = 0; row < kWarpSize; ++row) tile[row * width + threadIdx.x] = float(row);
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x * width];
}

__global__ void halves_kernel(const c10::BFloat16* x, c10::BFloat16* y) {
  float values[2];
  unpack(load_packed<2>(x + threadIdx.x * 2), values);
  if (threadIdx.x % 2 == 0) y[threadIdx.x] = c10::BFloat16(values[0] + values[1]);
}

__global__ void atomics_kernel(int* y) {
  int* counter = shared_memory<int>();
  counter[threadIdx.x] = 0;
  __syncthreads();
  atomicAdd(counter, 1);
  atomicMax(y, int(threadIdx.x));
}

// A block leaves the numbers of its threads; the last one doubles them.
__global__ void partials_kernel(Tickets tickets, float* partials) {
  float own[1] = {float(threadIdx.x)};
  store_partial(partials + threadIdx.x, own);
  if (!is_last_block(tickets, 0, gridDim.x)) return;
  own[0] = 2 * load_partial<1>(partials + threadIdx.x).v[0];
  store_partial(partials + threadIdx.x, own);
}

constexpr Cuda kDevice{nullptr};
extern "C" {
void copy_floats(const float* x, float* y, int stride, int blocks) {
  launch("copy", copy_kernel<float, 1>, unsigned(blocks), kWarpSize, 0, kDevice, x, y, stride);
}
void copy_four_floats(const float* x, float* y) { launch("copy", copy_kernel<float, 4>, 1, kWarpSize, 0, kDevice, x, y, 1); }
void copy_eight_halves(const void* x, void* y) {
  launch("copy", copy_kernel<c10::BFloat16, 8>, 1, kWarpSize, 0, kDevice, static_cast<const c10::BFloat16*>(x),
         static_cast<c10::BFloat16*>(y), 1);
}
void add_halves(const void* x, void* y) {
  launch("halves", halves_kernel, 1, kWarpSize, 0, kDevice, static_cast<const c10::BFloat16*>(x), static_cast<c10::BFloat16*>(y));
}
void count_by_atomics(int* y) { launch("atomics", atomics_kernel, 1, kWarpSize, kWarpSize * sizeof(int), kDevice, y); }
void leave_partials(float* partials, int blocks) {
  launch("partials", partials_kernel, unsigned(blocks), kWarpSize, 0, kDevice, take_tickets(kDevice), partials);
}
void transpose(float* y, int width) { launch("transpose", transpose_kernel, 1, kWarpSize, 32 * width * sizeof(float), kDevice, y, width); }
}
}  // namespace ef
