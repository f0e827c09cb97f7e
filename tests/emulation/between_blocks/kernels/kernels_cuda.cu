// Kernels whose blocks read what others wrote, rightly or not.
#include "../../../../csrc/common/last_block.cuh"

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

// sums[g] = of x[g], a number for each thread of the blocks (g, 0), (g, 1), ...
__global__ void sums_kernel(Tickets tickets, const float* x, float* partials, float* sums) {
  const int64_t first = int64_t(blockIdx.x) * gridDim.y * blockDim.x;
  const int64_t i = first + blockIdx.y * blockDim.x + threadIdx.x;
  const float own[1] = {x[i]};
  store_partial(partials + i, own);
  if (!is_last_block(tickets, blockIdx.x, gridDim.y) || threadIdx.x > 0) return;
  float sum = 0;
  for (unsigned k = 0; k < gridDim.y * blockDim.x; ++k) sum += load_partial<1>(partials + first + k).v[0];
  sums[blockIdx.x] = sum;
}

// sums[i] = of x[0][i], x[1][i], ..., by blocks of threads that each have an i, and chunks that each have a row of x.
__global__ void chunks_kernel(Finish finish, const float* x, float* partials, float* sums) {
  const unsigned size = gridDim.x * blockDim.x, i = blockIdx.x * blockDim.x + threadIdx.x;
  const float own[1] = {x[blockIdx.y * size + i]};
  store_partial(partials + blockIdx.y * size + i, own);
  add_chunks(finish, [&](const Chunks& chunks) {
    for (unsigned i = chunks.begin_x * blockDim.x + threadIdx.x; i < chunks.end_x * blockDim.x; i += blockDim.x) {
      float sum[1] = {};
      for (unsigned k = 0; k < chunks.count; ++k) sum[0] += load_partial<1>(partials + (chunks.first + k * chunks.stride) * size + i).v[0];
      chunks.are_all ? void(sums[i] = sum[0]) : store_partial(partials + chunks.first * size + i, sum);
    }
  });
}

constexpr Cuda kDevice{nullptr};
extern "C" {
void chain(float* y, int blocks) { launch("chain", chain_kernel, unsigned(blocks), kWarpSize, 0, kDevice, y); }
void handover(bool fence_before, bool fence_behind, int blocks, float* partials, unsigned* counter, float* sum) {
  launch("handover", handover_kernel, unsigned(blocks), 1, 0, kDevice, fence_before, fence_behind, partials, counter, sum);
}
// Returns whether it went well.
bool sums(const float* x, int groups, int blocks, float* partials, float* sums) {
  const Cuda device{emulation::stream};
  try {
    launch("sums", sums_kernel, dim3(unsigned(groups), unsigned(blocks)), kWarpSize, 0, device, take_tickets(device), x, partials, sums);
  } catch (const std::runtime_error&) {
    return false;
  }
  return true;
}
void chunks(const float* x, int blocks, int chunks, float* partials, float* sums) {
  const dim3 grid{unsigned(blocks), unsigned(chunks)};
  launch("chunks", chunks_kernel, grid, kWarpSize, 0, kDevice, finish_of(kDevice, grid), x, partials, sums);
}
void finish(int blocks, int chunks, unsigned (&of)[4]) {
  const Finish finish = finish_of(kDevice, {unsigned(blocks), unsigned(chunks)});
  of[0] = finish.fan, of[1] = finish.rows, of[2] = finish.width, of[3] = kMaxCounters;
}
void votes(const int* n, int count, int* y) { launch("votes", votes_kernel, 1, 70, 0, kDevice, n, count, y); }
}
}  // namespace ef
