// Weighted fusion of dense [n, h, w, c] tensors (NCHW: images of one channel); formulas in fusion_math.h. Here the nodes that pyramids
// are made of, whose last input is resampled, or none is; all other nodes are in fusion_any_kernel.cuh. A thread has a 16-byte vector
// of channels (kVec = 1, for nearest alone, where channels or alignment do not allow it), and takes at once
//
//   none         a pixel, of maps that are one row
//   nearest      a pixel of an input of half the size and its four children    P  ->  c c
//                                                                                     c c
//   max_pool     a window (fusion_max_pool.cuh), whose maxima and the numbers of their taps, a byte each, are kept for the backward
//
// All loads come first, in words as they are stored; each thread normalizes the 2 to 4 weights itself, while its first vectors are on
// their way (behind the first maximum of a window: before it, they would take registers from a third block of a multiprocessor).
// Backward, pass 1: a thread recomputes the sum, and so has at once the gradient of the inputs without resampling, of the nearest one
// (the sum over its children) and its part of the weights' gradient. Kept maxima are an input without resampling.
// Pass 2, for max_pool (and nearest inputs of a second size): gathers from the gradient of the sum that pass 1 stored, and the kept
// bytes. Finding the maxima again instead would read the input, 4 outputs large, a second time; scattering needs atomics.
// Bytes in output tensors of s bytes per element, forward + backward, with an activation: one nearest of 2 inputs 2.25 + 3.5 (the
// fewest possible); two plain and one max_pool (8 + 1 / s) + 7 + (5 + 1 / s).
// Weights: per thread, per block in a fixed tree, then over the blocks in order by one block: no atomics.
#pragma once

#include "fusion_any_kernel.cuh"

namespace ef::fusion {
// The output pixels that a thread takes at once, and their vectors of the inputs without resampling.
template <int kPlain, Resample kLast, int kVec, typename scalar_t>
struct Tile {
  static constexpr int kSide = kLast == Resample::kNearest ? 2 : 1, kPixels = kSide * kSide;
  int64_t at[kPixels];
  Packed<scalar_t, kVec> plain[kPixels][kPlain];

  // Tile x of a row of tiles; rows of all images are counted through.
  __device__ Tile(const Problem<scalar_t>& p, int64_t row, int64_t x, int64_t channel) {
#pragma unroll
    for (int j = 0; j < kPixels; ++j) at[j] = ((kSide * row + j / kSide) * p.w + kSide * x + j % kSide) * p.c + channel;
  }
  __device__ void load(const Problem<scalar_t>& p) {
#pragma unroll
    for (int j = 0; j < kPixels; ++j) {
#pragma unroll
      for (int i = 0; i < kPlain; ++i) plain[j][i] = load_packed<kVec>(p.inputs[i].x + at[j]);
    }
  }
};

// kKeeps: the maxima and the numbers of their taps.
template <int kCount, Resample kLast, bool kKeeps, int kVec, typename scalar_t>
__global__ __launch_bounds__(kThreads, 2) void fusion_kernel(Problem<scalar_t> p, Pooled<scalar_t> kept,
                                                             scalar_t* __restrict__ out) {  // [n, h, w, c]
  using A = acc_t<scalar_t>;
  constexpr int kPlain = kLast == Resample::kNone ? kCount : kCount - 1;
  using NodeTile = Tile<kPlain, kLast, kVec, scalar_t>;
  const Input<scalar_t>& last = p.inputs[kCount - 1];
  NormalizedWeights<A> weights{};
  bool has_weights = false;
  for_each_pixel<kVec>(p.n * p.h / NodeTile::kSide, p.w / NodeTile::kSide, p.c, [&](int64_t row, int64_t x, int64_t channel) {
    NodeTile tile(p, row, x, channel);
    tile.load(p);
    Packed<scalar_t, kVec> parent{};
    Values<A, kVec> resampled{};
    if constexpr (kLast == Resample::kNearest) {
      parent = load_packed<kVec>(last.x + (row * last.w + x) * p.c + channel);
    } else if constexpr (kLast == Resample::kMaxPool) {
      const int64_t image = quotient(row, p.h), y = row - image * p.h;
      const scalar_t* source = last.x + image * last.h * last.w * p.c + channel;
      uint8_t* taps = kKeeps ? kept.taps[kCount - 1] + tile.at[0] : nullptr;
      const Window<kVec, scalar_t> window(source, last, p.c, y, x);
      Packed<scalar_t, kVec> highest;
      Vec<uint8_t, kVec> numbers;
      if (window.template maximum<kKeeps>(highest, numbers)) {
        resampled = unpacked<kVec, scalar_t>(highest);
        if (kKeeps) store_vec<kVec>(taps, numbers);
      } else {
        resampled = pooled<kVec>(source, last, p.c, y, x, taps);
      }
      if (kKeeps) store_values<kVec>(kept.maxima[kCount - 1] + tile.at[0], resampled, A(1));
    }
    if (!has_weights) weights = normalized_weights(p.weights, kCount, p.method, p.eps);
    has_weights = true;
    if (kLast == Resample::kNearest) resampled = unpacked<kVec, scalar_t>(parent);
#pragma unroll
    for (int k = 0; kLast != Resample::kNone && k < kVec; ++k) resampled.v[k] *= weights.v[kCount - 1];
#pragma unroll
    for (int j = 0; j < NodeTile::kPixels; ++j) {
      Values<A, kVec> sum = resampled;
#pragma unroll
      for (int i = 0; i < kPlain; ++i) {
        const Values<A, kVec> r = unpacked<kVec, scalar_t>(tile.plain[j][i]);
#pragma unroll
        for (int k = 0; k < kVec; ++k) sum.v[k] += weights.v[i] * r.v[k];
      }
      activate_values(p.activation, sum);
      store_values<kVec>(out + tile.at[j], sum, A(1));
    }
  });
}

// kLast is none or nearest.
template <int kCount, Resample kLast, int kVec, typename scalar_t>
__global__ __launch_bounds__(kThreads, kLast == Resample::kNearest ? 2 : 3) void fusion_backward_kernel(Problem<scalar_t> p,
                                                                                                        Backward<scalar_t> work) {
  using A = acc_t<scalar_t>;
  constexpr bool kNearest = kLast == Resample::kNearest;
  constexpr int kLastInput = kCount - 1, kPlain = kNearest ? kCount - 1 : kCount;
  using NodeTile = Tile<kPlain, kLast, kVec, scalar_t>;
  const bool reads_inputs = work.grad_weights || p.activation != Activation::kNone;
  NormalizedWeights<A> weights{};
  bool has_weights = false;
  A dots[kCount] = {};
  for_each_pixel<kVec>(p.n * p.h / NodeTile::kSide, p.w / NodeTile::kSide, p.c, [&](int64_t row, int64_t x, int64_t channel) {
    NodeTile tile(p, row, x, channel);
    const int64_t parent_at = (row * p.inputs[kLastInput].w + x) * p.c + channel;
    Packed<scalar_t, kVec> grads[NodeTile::kPixels], packed_parent{};
#pragma unroll
    for (int j = 0; j < NodeTile::kPixels; ++j) grads[j] = load_packed<kVec>(work.grad + tile.at[j]);
    if (reads_inputs) {
      tile.load(p);
      if (kNearest) packed_parent = load_packed<kVec>(p.inputs[kLastInput].x + parent_at);
    }
    if (!has_weights) weights = normalized_weights(p.weights, kCount, p.method, p.eps);
    has_weights = true;
    const Values<A, kVec> parent = unpacked<kVec, scalar_t>(packed_parent);
    Values<A, kVec> parent_grad{};
#pragma unroll
    for (int j = 0; j < NodeTile::kPixels; ++j) {
      Values<A, kVec> grad = unpacked<kVec, scalar_t>(grads[j]), sum{}, r[kPlain] = {};
      if (reads_inputs) {
#pragma unroll
        for (int k = 0; kNearest && k < kVec; ++k) sum.v[k] = weights.v[kLastInput] * parent.v[k];
#pragma unroll
        for (int i = 0; i < kPlain; ++i) {
          r[i] = unpacked<kVec, scalar_t>(tile.plain[j][i]);
#pragma unroll
          for (int k = 0; k < kVec; ++k) sum.v[k] += weights.v[i] * r[i].v[k];
        }
        activate_values(p.activation, sum, &grad);
      }
      if (work.grad_sum) store_values<kVec>(work.grad_sum + tile.at[j], grad, A(1));
#pragma unroll
      for (int i = 0; i < kPlain; ++i) {
#pragma unroll
        for (int k = 0; k < kVec; ++k) dots[i] += grad.v[k] * r[i].v[k];
        if (work.grad_inputs[i]) store_values<kVec>(work.grad_inputs[i] + tile.at[j], grad, weights.v[i]);
      }
#pragma unroll
      for (int k = 0; kNearest && k < kVec; ++k) parent_grad.v[k] += grad.v[k];
    }
    if constexpr (kNearest) {
#pragma unroll
      for (int k = 0; k < kVec; ++k) dots[kLastInput] += parent_grad.v[k] * parent.v[k];
      if (work.grad_inputs[kLastInput]) store_values<kVec>(work.grad_inputs[kLastInput] + parent_at, parent_grad, weights.v[kLastInput]);
    }
  });
  if (work.grad_weights) store_partials(dots, kCount, work.partials);
}

// One block adds the partials [blocks, count] in an order that depends on their number only, then applies the chain rule.
template <typename A>
__device__ void add_partials(const A* __restrict__ partials, int64_t blocks, const A* __restrict__ weights, int count, FusionMethod method,
                             A eps, A* __restrict__ grad_weights) {  // [count]
  A totals[kMaxFusionInputs] = {};
#pragma unroll
  for (int i = 0; i < kMaxFusionInputs; ++i) {
    if (i >= count) continue;
    A mine = 0;
    for (int64_t b = threadIdx.x; b < blocks; b += blockDim.x) mine += partials[b * count + i];
    totals[i] = block_sum(mine, shared_memory<A>() + i * kWarpSize);
  }
  if (threadIdx.x != 0) return;
  weight_gradients(weights, count, method, eps, totals);
#pragma unroll
  for (int i = 0; i < kMaxFusionInputs; ++i)
    if (i < count) grad_weights[i] = totals[i];
}
template <typename A>
__global__ void fusion_weights_kernel(const A* __restrict__ partials, int64_t blocks, const A* __restrict__ weights, int count,
                                      FusionMethod method, A eps, A* __restrict__ grad_weights) {
  add_partials(partials, blocks, weights, count, method, eps, grad_weights);
}

}  // namespace ef::fusion
