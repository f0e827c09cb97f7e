// Weighted fusion of two to four inputs of any resampling, any sizes and any vectors: what no kernel is made for (fusion_kernel.cuh).
// Forward: a thread owns a vector of a pixel. Backward: of a parent (fusion.h), whose children it visits.
#pragma once

#include "fusion_max_pool.cuh"

namespace ef::fusion {
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

template <int kVec, typename scalar_t>
__global__ void fusion_any_kernel(Problem<scalar_t> p, Pooled<scalar_t> kept, scalar_t* __restrict__ out) {  // [n, h, w, c]
  using A = acc_t<scalar_t>;
  const NormalizedWeights<A> weights = normalized_weights(p.weights, p.count, p.method, p.eps);
  for_each_pixel<kVec>(p.n * p.h, p.w, p.c, [&](int64_t row, int64_t x, int64_t channel) {
    const int64_t image = quotient(row, p.h), y = row - image * p.h, at = (row * p.w + x) * p.c + channel;
    Values<A, kVec> sum;
#pragma unroll
    for (int i = 0; i < kMaxFusionInputs; ++i) {
      if (i >= p.count) continue;
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

template <int kVec, typename scalar_t>
__global__ void fusion_any_backward_kernel(Problem<scalar_t> p, Parents parents, Backward<scalar_t> work) {
  using A = acc_t<scalar_t>;
  const NormalizedWeights<A> weights = normalized_weights(p.weights, p.count, p.method, p.eps);
  const bool reads_inputs = work.grad_weights || p.activation != Activation::kNone;
  A dots[kMaxFusionInputs] = {};
  for_each_pixel<kVec>(p.n * parents.h, parents.w, p.c, [&](int64_t row, int64_t parent_x, int64_t channel) {
    const int64_t image = quotient(row, parents.h), parent_y = row - image * parents.h;
    Values<A, kVec> parent_sum{};
    const int64_t y_end = first_child(parent_y + 1, parents.h, p.h), x_end = first_child(parent_x + 1, parents.w, p.w);
    for (int64_t y = first_child(parent_y, parents.h, p.h); y < y_end; ++y) {
      for (int64_t x = first_child(parent_x, parents.w, p.w); x < x_end; ++x) {
        const int64_t at = ((image * p.h + y) * p.w + x) * p.c + channel;
        Values<A, kVec> grad = load_values<kVec>(work.grad + at), r[kMaxFusionInputs] = {}, sum{};
#pragma unroll
        for (int i = 0; i < kMaxFusionInputs; ++i) {
          if (i >= p.count || !reads_inputs) continue;
          r[i] = resampled<kVec>(p, p.inputs[i], image, y, x, channel);
#pragma unroll
          for (int k = 0; k < kVec; ++k) sum.v[k] += weights.v[i] * r[i].v[k];
        }
        activate_values(p.activation, sum, &grad);
        if (work.grad_sum) store_values<kVec>(work.grad_sum + at, grad, A(1));
#pragma unroll
        for (int i = 0; i < kMaxFusionInputs; ++i) {
#pragma unroll
          for (int k = 0; k < kVec; ++k) dots[i] += grad.v[k] * r[i].v[k];
          if (i < p.count && work.grad_inputs[i] && p.inputs[i].resample == Resample::kNone) {
            store_values<kVec>(work.grad_inputs[i] + at, grad, weights.v[i]);
          }
        }
#pragma unroll
        for (int k = 0; k < kVec; ++k) parent_sum.v[k] += grad.v[k];
      }
    }
#pragma unroll
    for (int i = 0; i < kMaxFusionInputs; ++i) {
      if (i < p.count && work.grad_inputs[i] && parents.own(p.inputs[i])) {
        store_values<kVec>(work.grad_inputs[i] + (row * parents.w + parent_x) * p.c + channel, parent_sum, weights.v[i]);
      }
    }
  });
  if (work.grad_weights) store_partials(dots, p.count, work.partials);
}

// A nearest input that is not of the parents' size: each of its pixels adds up its children.
template <int kVec, typename scalar_t>
__global__ void fusion_nearest_backward_kernel(Problem<scalar_t> p, int input, const scalar_t* __restrict__ grad_sum,  // [n, h, w, c]
                                               scalar_t* __restrict__ grad_input) {
  using A = acc_t<scalar_t>;
  const A weight = Normalizer<A>(p.weights, p.count, p.method, p.eps).weight(p.weights, input);
  const int64_t h = p.inputs[input].h, w = p.inputs[input].w;
  for_each_pixel<kVec>(p.n * h, w, p.c, [&](int64_t row, int64_t parent_x, int64_t channel) {
    const int64_t image = quotient(row, h), parent_y = row - image * h;
    Values<A, kVec> sum{};
    const int64_t y_end = first_child(parent_y + 1, h, p.h), x_end = first_child(parent_x + 1, w, p.w);
    for (int64_t y = first_child(parent_y, h, p.h); y < y_end; ++y) {
      for (int64_t x = first_child(parent_x, w, p.w); x < x_end; ++x) {
        const Values<A, kVec> grad = load_values<kVec>(grad_sum + ((image * p.h + y) * p.w + x) * p.c + channel);
#pragma unroll
        for (int k = 0; k < kVec; ++k) sum.v[k] += grad.v[k];
      }
    }
    store_values<kVec>(grad_input + (row * w + parent_x) * p.c + channel, sum, weight);
  });
}
}  // namespace ef::fusion
