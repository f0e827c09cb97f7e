// Focal loss over a dense [rows, classes] buffer; formulas in focal_loss_math.h.
// A thread owns one 16-byte vector of logits per step of a grid-stride loop; a vector may straddle rows, so its first row and class
// come from one division and are counted on from there. What is left behind the last whole vector is done one logit per thread.
// Bytes per logit of size s: forward 2 s (reads x, writes loss), sum s, backward 2 s, or 3 s with an elementwise upstream gradient;
// soft targets add s; labels add 8 / classes. Misaligned buffers take kVec = 1.
// The sum is per thread, per block in a fixed tree, then over the blocks' partials by one block: no atomics.
#pragma once
#include "../common/reduce.cuh"
#include "../common/vec.cuh"
#include "focal_loss.h"
#include "focal_loss_math.h"

namespace ef::focal_loss {
// A target maps a logit to its loss and gradient.
template <Modulator kModulator, typename A>
struct HardTarget {
  bool ignored, positive;
  // One evaluation for both signs: two would be two branches, each with its own exponential.
  __device__ A loss(A x, const Parameters<A>& p) const {
    const A value = hard_loss<kModulator>(positive ? -x : x, p) * (positive ? p.alpha_positive : p.alpha_negative);
    return ignored ? A(0) : value;
  }
  __device__ A grad(A x, const Parameters<A>& p) const {
    const A value = hard_grad<kModulator>(positive ? -x : x, p) * (positive ? -p.alpha_positive : p.alpha_negative);
    return ignored ? A(0) : value;
  }
};
template <Modulator kModulator, typename A>
struct SoftTarget {
  A t;
  __device__ A loss(A x, const Parameters<A>& p) const { return soft_loss<kModulator>(x, t, p); }
  __device__ A grad(A x, const Parameters<A>& p) const { return soft_grad<kModulator>(x, t, p); }
};

// The targets of the logits i .. i + kVec - 1.
template <Modulator kModulator, bool kSoft, int kVec, typename scalar_t>
class Targets {
 public:
  __device__ Targets(const Problem<scalar_t>& in, int64_t i) {
    if constexpr (kSoft) {
      soft_ = load_vec<kVec>(in.soft + i);
    } else {
      int64_t row = quotient(i, in.classes), column = i - row * in.classes;
      for (int begin = 0; begin < kVec; column = 0, ++row) {  // the rows that the vector touches: one or two, if there are many classes
        const int64_t label = in.labels[row], end = begin + in.classes - column, place = begin + label - column;
        const int last = end < kVec ? int(end) : kVec;
        if (label >= 0 && place >= begin && place < last) positive_ |= 1u << place;
        if (label == -2) ignored_ |= (1u << last) - (1u << begin);
        begin = last;
      }
    }
  }
  __device__ auto operator[](int k) const {
    using A = acc_t<scalar_t>;
    if constexpr (kSoft) {
      return SoftTarget<kModulator, A>{A(soft_.v[k])};
    } else {
      return HardTarget<kModulator, A>{(ignored_ >> k & 1) != 0, (positive_ >> k & 1) != 0};
    }
  }

 private:
  uint32_t positive_ = 0, ignored_ = 0;  // a bit for each logit
  Vec<scalar_t, kSoft ? kVec : 1> soft_;
};

// Calls f.template operator()<vector size>(i) for the vectors of n logits that fall to this thread.
template <int kVec, class F>
__device__ void for_each_vector(int64_t n, F&& f) {
  const int64_t vectors = n / kVec, threads = int64_t(gridDim.x) * blockDim.x, first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t i = first; i < vectors; i += threads) f.template operator()<kVec>(i * kVec);
  const int64_t rest = vectors * kVec + first;
  if (kVec > 1 && rest < n) f.template operator()<1>(rest);
}

template <Modulator kModulator, bool kSoft, int kVec, typename scalar_t>
__global__ void focal_loss_kernel(Problem<scalar_t> in, Parameters<acc_t<scalar_t>> p,
                                  scalar_t* __restrict__ loss) {  // [rows, classes]
  for_each_vector<kVec>(in.rows * in.classes, [&]<int kSize>(int64_t i) {
    const Vec<scalar_t, kSize> x = load_vec<kSize>(in.logits + i);
    const Targets<kModulator, kSoft, kSize, scalar_t> targets(in, i);
    Vec<scalar_t, kSize> out;
#pragma unroll
    for (int k = 0; k < kSize; ++k) out.v[k] = scalar_t(targets[k].loss(acc_t<scalar_t>(x.v[k]), p));
    store_vec<kSize>(loss + i, out);
  });
}

template <Modulator kModulator, bool kSoft, int kVec, typename scalar_t>
__global__ void focal_loss_sum_kernel(Problem<scalar_t> in, Parameters<acc_t<scalar_t>> p,
                                      acc_t<scalar_t>* __restrict__ partials) {  // [gridDim.x]
  acc_t<scalar_t> sum = 0;
  for_each_vector<kVec>(in.rows * in.classes, [&]<int kSize>(int64_t i) {
    const Vec<scalar_t, kSize> x = load_vec<kSize>(in.logits + i);
    const Targets<kModulator, kSoft, kSize, scalar_t> targets(in, i);
#pragma unroll
    for (int k = 0; k < kSize; ++k) sum += targets[k].loss(acc_t<scalar_t>(x.v[k]), p);
  });
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
  const A scale = grad_sum ? *grad_sum : A(0);
  for_each_vector<kVec>(in.rows * in.classes, [&]<int kSize>(int64_t i) {
    const Vec<scalar_t, kSize> x = load_vec<kSize>(in.logits + i);
    Vec<scalar_t, kSize> upstream{}, out;
    if (grad_loss) upstream = load_vec<kSize>(grad_loss + i);
    const Targets<kModulator, kSoft, kSize, scalar_t> targets(in, i);
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      out.v[k] = scalar_t((grad_loss ? A(upstream.v[k]) : scale) * targets[k].grad(A(x.v[k]), p));
    }
    store_vec<kSize>(grad_logits + i, out);
  });
}
}  // namespace ef::focal_loss
