// Kernels whose blocks read what others wrote, rightly or not.
#include "../../../../csrc/common/launch.cuh"

namespace ef {
// y[b] = b + 1, where the blocks run in order.
__global__ void chain_kernel(float* y) {
  if (threadIdx.x == 0) y[blockIdx.x] = blockIdx.x == 0 ? 1.f : y[blockIdx.x - 1] + 1.f;
}

// The sum of the blocks' numbers, by the last of them; with a fence in front of the ticket and one behind it, or without.
__global__ void handover_kernel(bool fence_before, bool fence_behind, float* partials, unsigned* counter, float* sum) {
  __stcg(partials + blockIdx.x, float(blockIdx.x));
  if (fence_before) __threadfence();
  const bool is_last = atomicAdd(counter, 1u) == gridDim.x - 1;
  if (fence_behind) __threadfence();
  if (!is_last) return;
  float total = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) total += __ldcg(partials + b);
  *sum = total;
}

// y[i] = whether any of the threads is below n[i].
__global__ void votes_kernel(const int* n, int votes, int* y) {
  for (int i = 0; i < votes; ++i) {
    const int any = __syncthreads_or(int(threadIdx.x) < n[i]);
    if (threadIdx.x == blockDim.x - 1) y[i] = any;
  }
}

constexpr Cuda kDevice{nullptr};
extern "C" {
void chain(float* y, int blocks) { launch("chain", chain_kernel, unsigned(blocks), kWarpSize, 0, kDevice, y); }
void handover(bool fence_before, bool fence_behind, int blocks, float* partials, unsigned* counter, float* sum) {
  launch("handover", handover_kernel, unsigned(blocks), 1, 0, kDevice, fence_before, fence_behind, partials, counter, sum);
}
void votes(const int* n, int count, int* y) { launch("votes", votes_kernel, 1, 70, 0, kDevice, n, count, y); }
}
}  // namespace ef
