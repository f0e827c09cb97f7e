// The small matrix products of squeeze-and-excite: [images, channels] values through `squeezed` values an image and back. What they read
// fits the L2 cache, so each kernel takes as many threads as it has sums; every sum has a fixed order.
#pragma once
#include "../common/launch.cuh"
#include "squeeze_excite.h"

namespace ef::squeeze_excite {
inline constexpr int kGateThreads = 256;
inline constexpr int kGateWarps = kGateThreads / kWarpSize;

// A warp per squeezed value.
template <Activation kActivation, typename A>
__global__ void squeeze_excite_squeeze_kernel(Weights<A> w, Gates<A> g) {
  const int64_t index = int64_t(blockIdx.x) * kGateWarps + threadIdx.x / kWarpSize;
  if (index >= g.images * w.squeezed) return;
  const int64_t image = quotient(index, w.squeezed), row = index - image * w.squeezed;
  const A* weight = w.reduce + row * w.channels;
  const A* mean = g.mean + image * w.channels;
  A sum = 0;
#pragma unroll 4
  for (int64_t c = threadIdx.x % kWarpSize; c < w.channels; c += kWarpSize) sum += weight[c] * mean[c];
  sum = warp_sum(sum);
  if (threadIdx.x % kWarpSize != 0) return;
  if (w.reduce_bias) sum += w.reduce_bias[row];
  g.reduced[index] = sum;
  g.squeezed[index] = activate<kActivation>(sum);
}

// out[n, i] = bias[i] + sum over k < count of in[n, k] weight[i row + k step] for n < images, i < rows, a thread each.
template <typename A>
__global__ void squeeze_excite_multiply_kernel(int64_t images, int64_t rows, int64_t count,
                                               const A* __restrict__ in,  // [images, count]
                                               const A* __restrict__ weight, int64_t row, int64_t step,
                                               const A* __restrict__ bias,  // [rows], or null
                                               A* __restrict__ out) {       // [images, rows]
  const int64_t index = int64_t(blockIdx.x) * kGateThreads + threadIdx.x;
  if (index >= images * rows) return;
  const int64_t image = quotient(index, rows), i = index - image * rows;
  A sum = bias ? bias[i] : A(0);
#pragma unroll 4
  for (int64_t k = 0; k < count; ++k) sum += in[image * count + k] * weight[i * row + k * step];
  out[index] = sum;
}

// out[i, j] = sum over k < count of left[k, i] right[k, j] for i < rows, j < columns, a thread each; bias[i] = sum over k of left[k, i].
template <typename A>
__global__ void squeeze_excite_grad_weight_kernel(int64_t count, int64_t rows, int64_t columns,
                                                  const A* __restrict__ left,   // [count, rows]
                                                  const A* __restrict__ right,  // [count, columns]
                                                  A* __restrict__ out,          // [rows, columns], or null
                                                  A* __restrict__ bias) {       // [rows], or null
  const int64_t index = int64_t(blockIdx.x) * kGateThreads + threadIdx.x;
  if (index >= rows * columns) return;
  const int64_t i = quotient(index, columns), j = index - i * columns;
  A sum = 0, bias_sum = 0;
#pragma unroll 4
  for (int64_t k = 0; k < count; ++k) {
    sum += left[k * rows + i] * right[k * columns + j];
    bias_sum += left[k * rows + i];
  }
  if (out) out[index] = sum;
  if (bias && j == 0) bias[i] = bias_sum;
}

// A block per kWarpSize squeezed values of an image, whose sums over the channels its kGateWarps rows of threads share.
template <Activation kActivation, typename A>
__global__ void squeeze_excite_grad_reduced_kernel(Weights<A> w, Gates<A> g, GateGradients<A> grad) {
  const int64_t r = int64_t(blockIdx.y) * kWarpSize + threadIdx.x, image = blockIdx.x;
  A sum = 0;
  if (r < w.squeezed) {
#pragma unroll 4
    for (int64_t c = threadIdx.y; c < w.channels; c += kGateWarps) sum += grad.gate[image * w.channels + c] * w.expand[c * w.squeezed + r];
  }
  A* shared = shared_memory<A>();  // [kGateWarps][kWarpSize]
  shared[threadIdx.y * kWarpSize + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || r >= w.squeezed) return;
  for (int share = 1; share < kGateWarps; ++share) sum += shared[share * kWarpSize + threadIdx.x];
  grad.reduced[image * w.squeezed + r] = activate_backward<kActivation>(sum, g.reduced[image * w.squeezed + r]);
}
}  // namespace ef::squeeze_excite
