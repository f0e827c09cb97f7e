// Kernels whose blocks read what others wrote, rightly or not.
#include "../../../../csrc/common/launch.cuh"

namespace ef {
// y[b] = b + 1, where the blocks run in order.
__global__ void chain_kernel(float* y) {
  if (threadIdx.x == 0) y[blockIdx.x] = blockIdx.x == 0 ? 1.f : y[blockIdx.x - 1] + 1.f;
}

constexpr Cuda kDevice{nullptr};
extern "C" {
void chain(float* y, int blocks) { launch("chain", chain_kernel, unsigned(blocks), kWarpSize, 0, kDevice, y); }
}
}  // namespace ef
