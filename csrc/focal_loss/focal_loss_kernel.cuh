// Focal loss over a dense [rows, classes] buffer; formulas in focal_loss_math.h.
// A thread owns one 16-byte vector of logits per step of a grid-stride loop; a vector may straddle rows. Its first row and class come
// from a division once, and are stepped from there. What is left behind the last whole vector is done one logit per thread. Vectors of
// nothing but background, nearly all, take a shorter way to the sum and to its gradient (focal_loss_vector.cuh).
// Bytes per logit of size s: forward 2 s (reads x, writes loss), sum s, backward 2 s, or 3 s with an elementwise upstream gradient;
// soft targets add s; labels add 8 / classes. Misaligned buffers, and 2^30 classes, take kVec = 1.
// The sum is per thread, per block in a fixed tree, then over the blocks' partials by one block: no atomics.
#pragma once
#include "../common/launch.cuh"
#include "../common/vec.cuh"
#include "focal_loss.h"
#include "focal_loss_math.h"
#include "focal_loss_vector.cuh"

namespace ef::focal_loss {
// A target maps a logit to its loss and gradient, without the weight of its class.
template <Modulator kModulator, typename A>
struct HardTarget {
  bool ignored, positive;
  // One evaluation for both signs: two would be two branches, each with its own exponential.
  __device__ A loss(A x, const Parameters<A>& p) const {
    const A value = hard_loss<kModulator>(positive ? -x : x, p) * (positive ? p.alpha_positive : p.alpha_negative);
    return ignored ? A(0) : value;
  }
  __device__ A grad(A x, const Parameters<A>& p, A upstream) const {
    const A value = hard_grad<kModulator>(positive ? -x : x, p) * (positive ? -p.alpha_positive : p.alpha_negative);
    return ignored ? A(0) : upstream * value;  // whatever comes from above
  }
};
template <Modulator kModulator, typename A>
struct SoftTarget {
  A t;
  __device__ A loss(A x, const Parameters<A>& p) const { return soft_loss<kModulator>(x, t, p); }
  __device__ A grad(A x, const Parameters<A>& p, A upstream) const { return upstream * soft_grad<kModulator>(x, t, p); }
};

using VectorPlace = Place<int64_t, int>;
using SinglePlace = Place<int64_t, int64_t>;

// The targets of the logits i .. i + kVec - 1, the first of which is at a place, and the weights of their classes.
template <Modulator kModulator, bool kSoft, int kVec, typename scalar_t>
class Targets {
 public:
  template <class At>
  __device__ Targets(const Problem<scalar_t>& in, int64_t i, const At& at) : in_(in), column_(at.column) {
    if (kSoft && in.class_weight) column_ = i - quotient(i, in.classes) * in.classes;
    if constexpr (kSoft) {
      soft_ = load_vec<kVec>(in.soft + i);
    } else {
      marks_ = marks_of<kVec>(at, in.classes);
    }
  }
  __device__ acc_t<scalar_t> weight(int k) const { return class_weight_at(in_.class_weight, column_ + k, in_.classes); }
  __device__ auto operator[](int k) const {
    using A = acc_t<scalar_t>;
    if constexpr (kSoft) {
      return SoftTarget<kModulator, A>{A(soft_.v[k])};
    } else {
      return HardTarget<kModulator, A>{(marks_.ignored >> k & 1) != 0, (marks_.positive >> k & 1) != 0};
    }
  }

 private:
  const Problem<scalar_t>& in_;
  int64_t column_;
  Marks marks_;
  Vec<scalar_t, kSoft ? kVec : 1> soft_;
};

// Calls f.template operator()<vector size>(i, place of i) for the vectors of the logits that fall to this thread; soft targets need no
// place.
template <bool kSoft, int kVec, typename scalar_t, class F>
__device__ void for_each_vector(const Problem<scalar_t>& in, F&& f) {
  const int64_t n = in.rows * in.classes, vectors = n / kVec;
  const int64_t threads = int64_t(gridDim.x) * blockDim.x, first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const auto single = [&](int64_t i) { f.template operator()<1>(i, kSoft ? SinglePlace{} : SinglePlace::of(in.labels, i, in.classes)); };
  if constexpr (kVec == 1) {
    for (int64_t i = first; i < n; i += threads) single(i);
  } else {
    VectorPlace at{};
    Stride stride{};
    if constexpr (!kSoft) {
      at = VectorPlace::of(in.labels, first * kVec, in.classes);
      stride = Stride::of(threads * kVec, in.classes);
    }
    for (int64_t i = first; i < vectors; i += threads) {
      f.template operator()<kVec>(i * kVec, at);
      if constexpr (!kSoft) at.advance(stride, int(in.classes));
    }
    if (const int64_t rest = vectors * kVec + first; rest < n) single(rest);
  }
}

template <Modulator kModulator, bool kSoft, int kVec, typename scalar_t>
__global__ void focal_loss_kernel(Problem<scalar_t> in, Parameters<acc_t<scalar_t>> p,
                                  scalar_t* __restrict__ loss) {  // [rows, classes]
  for_each_vector<kSoft, kVec>(in, [&]<int kSize>(int64_t i, const auto& at) {
    const Vec<scalar_t, kSize> x = load_vec<kSize>(in.logits + i);
    const Targets<kModulator, kSoft, kSize, scalar_t> targets(in, i, at);
    Vec<scalar_t, kSize> out;
#pragma unroll
    for (int k = 0; k < kSize; ++k) out.v[k] = scalar_t(targets.weight(k) * targets[k].loss(acc_t<scalar_t>(x.v[k]), p));
    store_vec<kSize>(loss + i, out);
  });
}

template <Modulator kModulator, bool kSoft, int kVec, typename scalar_t>
__global__ void focal_loss_sum_kernel(Problem<scalar_t> in, Parameters<acc_t<scalar_t>> p,
                                      acc_t<scalar_t>* __restrict__ partials) {  // [gridDim.x]
  acc_t<scalar_t> sum = 0, of_background = 0;
  for_each_vector<kSoft, kVec>(in, [&]<int kSize>(int64_t i, const auto& at) {
    const Vec<scalar_t, kSize> x = load_vec<kSize>(in.logits + i);
    if constexpr (!kSoft && kSize > 1) {
      if (!in.class_weight && all_background<kSize>(at, int(in.classes))) {
        Vec<scalar_t, kSize> unused;
        of_background += background<kModulator>(x, p, Slope<acc_t<scalar_t>>(p, 0), unused);
        return;
      }
    }
    const Targets<kModulator, kSoft, kSize, scalar_t> targets(in, i, at);
#pragma unroll
    for (int k = 0; k < kSize; ++k) sum += targets.weight(k) * targets[k].loss(acc_t<scalar_t>(x.v[k]), p);
  });
  sum = block_sum(p.alpha_negative * of_background + sum, shared_memory<acc_t<scalar_t>>());
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
                                           const acc_t<scalar_t>* __restrict__ grad_sum,  // [1], instead
                                           scalar_t* __restrict__ grad_logits) {          // [rows, classes]
  using A = acc_t<scalar_t>;
  const auto store = [&]<int kSize>(int64_t i, const auto& at, const Vec<scalar_t, kSize>& x, auto upstream) {
    const Targets<kModulator, kSoft, kSize, scalar_t> targets(in, i, at);
    Vec<scalar_t, kSize> out;
#pragma unroll
    for (int k = 0; k < kSize; ++k) out.v[k] = scalar_t(targets.weight(k) * targets[k].grad(A(x.v[k]), p, upstream(k)));
    store_vec<kSize>(grad_logits + i, out);
  };
  if (grad_loss) {
    for_each_vector<kSoft, kVec>(in, [&]<int kSize>(int64_t i, const auto& at) {
      const Vec<scalar_t, kSize> upstream = load_vec<kSize>(grad_loss + i);
      store(i, at, load_vec<kSize>(in.logits + i), [&](int k) { return A(upstream.v[k]); });
    });
    return;
  }
  const A scale = *grad_sum;
  const Slope<A> slope(p, scale * p.alpha_negative);
  for_each_vector<kSoft, kVec>(in, [&]<int kSize>(int64_t i, const auto& at) {
    const Vec<scalar_t, kSize> x = load_vec<kSize>(in.logits + i);
    if constexpr (!kSoft && kSize > 1) {
      if (!in.class_weight && all_background<kSize>(at, int(in.classes))) {
        Vec<scalar_t, kSize> out;
        background<kModulator>(x, p, slope, out);
        store_vec<kSize>(grad_logits + i, out);
        return;
      }
    }
    store(i, at, x, [&](int) { return scale; });
  });
}
}  // namespace ef::focal_loss
