// Weighted fusion of dense [n, h, w, c] tensors (NCHW: images of one channel); formulas in fusion_math.h.
// A thread owns one 16-byte vector of channels of a pixel (kVec = 1 where channels or alignment do not allow it) at a fixed column, and
// steps down the rows of the batch: the column arithmetic is done once, neighboring lanes read neighboring addresses.
// Besides the inputs and weights, the maxima of max_pool and one byte each that says which tap they are is kept for the backward; each
// thread normalizes the 2 to 4 weights itself.
// Backward, pass 1, over cells (fusion.h): a thread visits its cell's children, recomputes their sum, and so has at once the gradient
// of the inputs without resampling, of the nearest inputs (the sum over the children) and its part of the weights' gradient.
// Pass 2, for max_pool (and nearest inputs of a second size): gathers from the gradient of the sum that pass 1 stored, and the kept
// bytes. Finding the maxima again instead would read the input, 4 outputs large, a second time; scattering needs atomics.
// Bytes in output tensors of s bytes per element, forward + backward, with an activation: one nearest of 2 inputs 2.25 + 3.5 (the
// fewest possible); two plain and one max_pool (8 + 1 / s) + 7 + (5 + 1 / s).
// Weights: per thread, per block in a fixed tree, then over the blocks in order by one block: no atomics.
#pragma once

#include "../common/launch.cuh"
#include "../common/vec.cuh"
#include "fusion.h"

namespace ef::fusion {
template <typename A, int kVec>
struct Values {
  A v[kVec];
};

// Calls f(image, y, x, channel) for the pixels of images [n, h, w] that fall to this thread.
template <int kVec, class F>
__device__ void for_each_pixel(int64_t n, int64_t h, int64_t w, int64_t c, F&& f) {
  const int64_t vectors = c / kVec;
  for (int64_t column = int64_t(blockIdx.y) * blockDim.x + threadIdx.x; column < w * vectors; column += int64_t(gridDim.y) * blockDim.x) {
    const int64_t x = quotient(column, vectors), channel = (column - x * vectors) * kVec;
    for (int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; row < n * h; row += int64_t(gridDim.x) * blockDim.y) {
      const int64_t image = quotient(row, h);
      f(image, row - image * h, x, channel);
    }
  }
}

template <int kVec, typename scalar_t>
__device__ Values<acc_t<scalar_t>, kVec> load_values(const scalar_t* p) {
  const Vec<scalar_t, kVec> raw = load_vec<kVec>(p);
  Values<acc_t<scalar_t>, kVec> result;
#pragma unroll
  for (int k = 0; k < kVec; ++k) result.v[k] = acc_t<scalar_t>(raw.v[k]);
  return result;
}
template <int kVec, typename scalar_t>
__device__ void store_values(scalar_t* p, const Values<acc_t<scalar_t>, kVec>& value, acc_t<scalar_t> factor) {
  Vec<scalar_t, kVec> raw;
#pragma unroll
  for (int k = 0; k < kVec; ++k) raw.v[k] = scalar_t(factor * value.v[k]);
  store_vec<kVec>(p, raw);
}

// Maximum of window (y, x) of the image `source` [h, w, c], already at its channel; its taps go to taps[0 .. kVec) unless null.
template <int kVec, typename scalar_t>
__device__ Values<acc_t<scalar_t>, kVec> pooled(const scalar_t* source, const Input<scalar_t>& in, int64_t c, int64_t y, int64_t x,
                                                uint8_t* taps) {
  using A = acc_t<scalar_t>;
  const int64_t top = 2 * y - pool_before(in.h), left = 2 * x - pool_before(in.w);
  Values<A, kVec> highest;
  Vec<uint8_t, kVec> tap;
#pragma unroll
  for (int k = 0; k < kVec; ++k) {
    highest.v[k] = A(-INFINITY);
    tap.v[k] = uint8_t(first_tap(top < 0, left < 0));
  }
#pragma unroll
  for (int ky = 0; ky < 3; ++ky) {
#pragma unroll
    for (int kx = 0; kx < 3; ++kx) {
      if (top + ky < 0 || top + ky >= in.h || left + kx < 0 || left + kx >= in.w) continue;
      const Values<A, kVec> value = load_values<kVec>(source + ((top + ky) * in.w + left + kx) * c);
#pragma unroll
      for (int k = 0; k < kVec; ++k) {
        if (is_new_maximum(value.v[k], highest.v[k])) {
          highest.v[k] = value.v[k];
          tap.v[k] = uint8_t(3 * ky + kx);
        }
      }
    }
  }
  if (taps) store_vec<kVec>(taps, tap);
  return highest;
}

// An input that is not pooled.
template <int kVec, typename scalar_t>
__device__ Values<acc_t<scalar_t>, kVec> resampled(const Problem<scalar_t>& p, const Input<scalar_t>& in, int64_t image, int64_t y,
                                                   int64_t x, int64_t channel) {
  const scalar_t* source = in.x + image * in.h * in.w * p.c + channel;
  if (in.resample == Resample::kNearest) {
    y = nearest_source(y, in.h, p.h);
    x = nearest_source(x, in.w, p.w);
  }
  return load_values<kVec>(source + (y * in.w + x) * p.c);
}

// Each value activated; or, of a gradient for those, that for the values before it. `activation` is decided once per vector.
template <int kVec, typename A>
__device__ void activate_values(Activation activation, Values<A, kVec>& value, Values<A, kVec>* grad = nullptr) {
  const auto apply = [&]<Activation kActivation>() {
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      if (grad) {
        grad->v[k] = activate_backward<kActivation>(grad->v[k], value.v[k]);
      } else {
        value.v[k] = activate<kActivation>(value.v[k]);
      }
    }
  };
  static_assert(count_of(Activation{}) == 4, "a branch for the new activation");
  if (activation == Activation::kSilu) return apply.template operator()<Activation::kSilu>();
  if (activation == Activation::kRelu) return apply.template operator()<Activation::kRelu>();
  if (activation == Activation::kRelu6) return apply.template operator()<Activation::kRelu6>();
  apply.template operator()<Activation::kNone>();
}

template <int kCount, int kVec, typename scalar_t>
__global__ void fusion_kernel(Problem<scalar_t> p, Pooled<scalar_t> kept, scalar_t* __restrict__ out) {  // [n, h, w, c]
  using A = acc_t<scalar_t>;
  const NormalizedWeights<A> weights = normalized_weights(p.weights, kCount, p.method, p.eps);
  for_each_pixel<kVec>(p.n, p.h, p.w, p.c, [&](int64_t image, int64_t y, int64_t x, int64_t channel) {
    const int64_t at = ((image * p.h + y) * p.w + x) * p.c + channel;
    Values<A, kVec> sum;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Input<scalar_t>& in = p.inputs[i];
      Values<A, kVec> r;
      if (in.resample == Resample::kMaxPool) {
        r = pooled<kVec>(in.x + image * in.h * in.w * p.c + channel, in, p.c, y, x, kept.taps[i] ? kept.taps[i] + at : nullptr);
        if (kept.maxima[i]) store_values<kVec>(kept.maxima[i] + at, r, A(1));
      } else {
        r = resampled<kVec>(p, in, image, y, x, channel);
      }
#pragma unroll
      for (int k = 0; k < kVec; ++k) sum.v[k] = i == 0 ? weights.v[i] * r.v[k] : sum.v[k] + weights.v[i] * r.v[k];
    }
    activate_values(p.activation, sum);
    store_values<kVec>(out + at, sum, A(1));
  });
}

template <int kCount, int kVec, typename scalar_t>
__global__ void fusion_backward_kernel(Problem<scalar_t> p, Cells cells, Backward<scalar_t> work) {
  using A = acc_t<scalar_t>;
  const NormalizedWeights<A> weights = normalized_weights(p.weights, kCount, p.method, p.eps);
  const bool reads_inputs = work.grad_weights || p.activation != Activation::kNone;
  A dots[kCount] = {};
  for_each_pixel<kVec>(p.n, cells.h, cells.w, p.c, [&](int64_t image, int64_t cell_y, int64_t cell_x, int64_t channel) {
    Values<A, kVec> cell_sum{};
    const int64_t y_end = first_child(cell_y + 1, cells.h, p.h), x_end = first_child(cell_x + 1, cells.w, p.w);
    for (int64_t y = first_child(cell_y, cells.h, p.h); y < y_end; ++y) {
      for (int64_t x = first_child(cell_x, cells.w, p.w); x < x_end; ++x) {
        const int64_t at = ((image * p.h + y) * p.w + x) * p.c + channel;
        Values<A, kVec> grad = load_values<kVec>(work.grad + at), r[kCount] = {};
#pragma unroll
        for (int i = 0; i < kCount; ++i)
          if (reads_inputs) r[i] = resampled<kVec>(p, p.inputs[i], image, y, x, channel);
        if (p.activation != Activation::kNone) {
          Values<A, kVec> sum;
#pragma unroll
          for (int k = 0; k < kVec; ++k) {
            sum.v[k] = weights.v[0] * r[0].v[k];
#pragma unroll
            for (int i = 1; i < kCount; ++i) sum.v[k] += weights.v[i] * r[i].v[k];
          }
          activate_values(p.activation, sum, &grad);
        }
        if (work.grad_sum) store_values<kVec>(work.grad_sum + at, grad, A(1));
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
#pragma unroll
          for (int k = 0; k < kVec; ++k) dots[i] += grad.v[k] * r[i].v[k];
          if (work.grad_inputs[i] && p.inputs[i].resample == Resample::kNone) {
            store_values<kVec>(work.grad_inputs[i] + at, grad, weights.v[i]);
          }
        }
#pragma unroll
        for (int k = 0; k < kVec; ++k) cell_sum.v[k] += grad.v[k];
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (work.grad_inputs[i] && cells.own(p.inputs[i])) {
        store_values<kVec>(work.grad_inputs[i] + ((image * cells.h + cell_y) * cells.w + cell_x) * p.c + channel, cell_sum, weights.v[i]);
      }
    }
  });
  if (!work.grad_weights) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    dots[i] = block_sum(dots[i], shared_memory<A>() + i * kWarpSize);
    if (threadIdx.x == 0 && threadIdx.y == 0) work.partials[(int64_t(blockIdx.y) * gridDim.x + blockIdx.x) * kCount + i] = dots[i];
  }
}

// One block adds the partials [blocks, count] in an order that depends on their number only, then applies the chain rule.
template <typename A>
__global__ void fusion_weights_kernel(const A* __restrict__ partials, int64_t blocks, const A* __restrict__ weights, int count,
                                      FusionMethod method, A eps, A* __restrict__ grad_weights) {  // [count]
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

// A nearest input that is not of the cells' size: each of its pixels adds up its children.
template <int kVec, typename scalar_t>
__global__ void fusion_nearest_backward_kernel(Problem<scalar_t> p, int input, const scalar_t* __restrict__ grad_sum,  // [n, h, w, c]
                                               scalar_t* __restrict__ grad_input) {
  using A = acc_t<scalar_t>;
  const A weight = Normalizer<A>(p.weights, p.count, p.method, p.eps).weight(p.weights, input);
  const int64_t h = p.inputs[input].h, w = p.inputs[input].w;
  for_each_pixel<kVec>(p.n, h, w, p.c, [&](int64_t image, int64_t parent_y, int64_t parent_x, int64_t channel) {
    Values<A, kVec> sum{};
    const int64_t y_end = first_child(parent_y + 1, h, p.h), x_end = first_child(parent_x + 1, w, p.w);
    for (int64_t y = first_child(parent_y, h, p.h); y < y_end; ++y) {
      for (int64_t x = first_child(parent_x, w, p.w); x < x_end; ++x) {
        const Values<A, kVec> grad = load_values<kVec>(grad_sum + ((image * p.h + y) * p.w + x) * p.c + channel);
#pragma unroll
        for (int k = 0; k < kVec; ++k) sum.v[k] += grad.v[k];
      }
    }
    store_values<kVec>(grad_input + ((image * h + parent_y) * w + parent_x) * p.c + channel, sum, weight);
  });
}

// A thread owns window (y, x) and the four input pixels at its taps (0, 0) to (1, 1), which only this window and the ones above and to
// the left of it cover: together the threads own every pixel of the input once.
template <int kVec, typename scalar_t>
__global__ void fusion_max_pool_backward_kernel(Problem<scalar_t> p, int input, const scalar_t* __restrict__ grad_sum,  // [n, h, w, c]
                                                const uint8_t* __restrict__ taps,                                       // [n, h, w, c]
                                                int64_t h, int64_t w, scalar_t* __restrict__ grad_input) {  // [n, of h, of w, c]
  using A = acc_t<scalar_t>;
  const A weight = Normalizer<A>(p.weights, p.count, p.method, p.eps).weight(p.weights, input);
  for_each_pixel<kVec>(p.n, p.h, p.w, p.c, [&](int64_t image, int64_t y, int64_t x, int64_t channel) {
    Values<A, kVec> sums[2][2] = {};
#pragma unroll
    for (int up = 0; up < 2; ++up) {
#pragma unroll
      for (int left = 0; left < 2; ++left) {
        if (y < up || x < left) continue;
        const int64_t at = ((image * p.h + y - up) * p.w + x - left) * p.c + channel;
        const Values<A, kVec> grad = load_values<kVec>(grad_sum + at);
        const Vec<uint8_t, kVec> tap = load_vec<kVec>(taps + at);
#pragma unroll
        for (int a = 0; a < 2 - up; ++a) {  // of a window above only the last row of taps is owned here, as this window's first
#pragma unroll
          for (int b = 0; b < 2 - left; ++b) {
#pragma unroll
            for (int k = 0; k < kVec; ++k) sums[a][b].v[k] += tap.v[k] == 3 * (a + 2 * up) + b + 2 * left ? grad.v[k] : A(0);
          }
        }
      }
    }
#pragma unroll
    for (int a = 0; a < 2; ++a) {
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        const int64_t row = 2 * y - pool_before(h) + a, column = 2 * x - pool_before(w) + b;
        if (row < 0 || column < 0) continue;
        store_values<kVec>(grad_input + ((image * h + row) * w + column) * p.c + channel, sums[a][b], weight);
      }
    }
  });
}
}  // namespace ef::fusion
