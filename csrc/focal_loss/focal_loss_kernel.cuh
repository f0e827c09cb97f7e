// Focal loss over a dense [rows, classes] buffer; formulas in focal_loss_math.h.
// A thread owns one 16-byte vector of logits per step of a grid-stride loop; a vector may straddle rows, so its first row and class
// come from one division and are counted on from there. The last, partial vector is done element by element.
// Bytes per logit of size s: forward 2 s (reads x, writes loss), sum s, backward 2 s, or 3 s with an elementwise upstream gradient;
// soft targets add s; labels add 8 / classes. Misaligned buffers take kVec = 1.
// The sum is per thread, per block in a fixed tree, then over the blocks' partials by one block: no atomics.
#pragma once
#include "../common/reduce.cuh"
#include "../common/vec.cuh"
#include "focal_loss.h"
#include "focal_loss_math.h"

namespace ef::focal_loss {
// Walks the logits of one vector, with the label of each one's row.
struct RowCursor {
  int64_t row, column, label;
  template <typename scalar_t>
  __device__ RowCursor(const Problem<scalar_t>& in, int64_t i) : row(i / in.classes), column(i % in.classes), label(in.labels[row]) {}
  template <typename scalar_t>
  __device__ void advance(const Problem<scalar_t>& in, int64_t i, int64_t n) {
    if (++column == in.classes) {
      column = 0;
      ++row;
      if (i + 1 < n) label = in.labels[row];
    }
  }
};

// Calls f(i, x, target) for the logits i .. i + kVec - 1 below n. `target` maps to loss(x) and grad(x).
template <Modulator kModulator, typename A>
struct HardTarget {
  int64_t label, column;
  __device__ A loss(A x, const Parameters<A>& p) const {
    if (label == -2) return A(0);
    return label == column ? p.alpha_positive * hard_loss<kModulator>(-x, p) : p.alpha_negative * hard_loss<kModulator>(x, p);
  }
  __device__ A grad(A x, const Parameters<A>& p) const {
    if (label == -2) return A(0);
    return label == column ? -p.alpha_positive * hard_grad<kModulator>(-x, p) : p.alpha_negative * hard_grad<kModulator>(x, p);
  }
};
template <Modulator kModulator, typename A>
struct SoftTarget {
  A t;
  __device__ A loss(A x, const Parameters<A>& p) const { return soft_loss<kModulator>(x, t, p); }
  __device__ A grad(A x, const Parameters<A>& p) const { return soft_grad<kModulator>(x, t, p); }
};

template <Modulator kModulator, bool kSoft, int kVec, typename scalar_t, class F>
__device__ void for_each_in_vector(const Problem<scalar_t>& in, int64_t i, int64_t n, F&& f) {
  using A = acc_t<scalar_t>;
  const int count = n - i < kVec ? int(n - i) : kVec;
  Vec<scalar_t, kVec> x, t;
  if (count == kVec) {
    x = load_vec<kVec>(in.logits + i);
    if constexpr (kSoft) t = load_vec<kVec>(in.soft + i);
  } else {
    for (int k = 0; k < count; ++k) {
      x.v[k] = in.logits[i + k];
      if constexpr (kSoft) t.v[k] = in.soft[i + k];
    }
  }
  if constexpr (kSoft) {
#pragma unroll
    for (int k = 0; k < kVec; ++k)
      if (k < count) f(k, A(x.v[k]), SoftTarget<kModulator, A>{A(t.v[k])});
  } else {
    RowCursor cursor(in, i);
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      if (k < count) {
        f(k, A(x.v[k]), HardTarget<kModulator, A>{cursor.label, cursor.column});
        cursor.advance(in, i + k, n);
      }
    }
  }
}

template <int kVec, typename scalar_t>
__device__ void store_up_to(scalar_t* out, const Vec<scalar_t, kVec>& value, int64_t i, int64_t n) {
  if (i + kVec <= n) {
    store_vec<kVec>(out + i, value);
  } else {
    for (int64_t k = i; k < n; ++k) out[k] = value.v[k - i];
  }
}

template <Modulator kModulator, bool kSoft, int kVec, typename scalar_t>
__global__ void focal_loss_kernel(Problem<scalar_t> in, Parameters<acc_t<scalar_t>> p,
                                  scalar_t* __restrict__ loss) {  // [rows, classes]
  const int64_t n = in.rows * in.classes, stride = int64_t(gridDim.x) * blockDim.x * kVec;
  for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * kVec; i < n; i += stride) {
    Vec<scalar_t, kVec> out;
    for_each_in_vector<kModulator, kSoft, kVec>(in, i, n,
                                                [&](int k, auto x, const auto& target) { out.v[k] = scalar_t(target.loss(x, p)); });
    store_up_to(loss, out, i, n);
  }
}

template <Modulator kModulator, bool kSoft, int kVec, typename scalar_t>
__global__ void focal_loss_sum_kernel(Problem<scalar_t> in, Parameters<acc_t<scalar_t>> p,
                                      acc_t<scalar_t>* __restrict__ partials) {  // [gridDim.x]
  acc_t<scalar_t> sum = 0;
  const int64_t n = in.rows * in.classes, stride = int64_t(gridDim.x) * blockDim.x * kVec;
  for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * kVec; i < n; i += stride) {
    for_each_in_vector<kModulator, kSoft, kVec>(in, i, n, [&](int, auto x, const auto& target) { sum += target.loss(x, p); });
  }
  sum = block_sum(sum, shared_memory<acc_t<scalar_t>>());
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// One block adds the partials in an order that depends on their number only.
template <typename A>
__global__ void add_partials_kernel(const A* __restrict__ partials,  // [count]
                                    int64_t count, A* __restrict__ sum) {
  A mine = 0;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) mine += partials[i];
  mine = block_sum(mine, shared_memory<A>());
  if (threadIdx.x == 0) *sum = mine;
}

template <Modulator kModulator, bool kSoft, int kVec, typename scalar_t>
__global__ void focal_loss_backward_kernel(Problem<scalar_t> in, Parameters<acc_t<scalar_t>> p,
                                           const scalar_t* __restrict__ grad_loss,        // [rows, classes], or null
                                           const acc_t<scalar_t>* __restrict__ grad_sum,  // [1], or null
                                           scalar_t* __restrict__ grad_logits) {          // [rows, classes]
  using A = acc_t<scalar_t>;
  const int64_t n = in.rows * in.classes, stride = int64_t(gridDim.x) * blockDim.x * kVec;
  const A scale = grad_sum ? *grad_sum : A(0);
  for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * kVec; i < n; i += stride) {
    Vec<scalar_t, kVec> upstream, out;
    if (grad_loss && i + kVec <= n) {
      upstream = load_vec<kVec>(grad_loss + i);
    } else {
      for (int k = 0; k < kVec; ++k) upstream.v[k] = grad_loss && i + k < n ? grad_loss[i + k] : scalar_t(0.f);
    }
    for_each_in_vector<kModulator, kSoft, kVec>(in, i, n, [&](int k, auto x, const auto& target) {
      out.v[k] = scalar_t((grad_loss ? A(upstream.v[k]) : scale) * target.grad(x, p));
    });
    store_up_to(grad_logits, out, i, n);
  }
}
}  // namespace ef::focal_loss
