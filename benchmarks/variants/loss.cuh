// Focal loss with its gradient over bfloat16 logits that are nearly all background, gamma 1.5, as csrc/detection_loss goes through the
// channels_last logits of a level. Of -log(1 - y), y = sigmoid(x), each variant has another polynomial:
//
//   degree 8       of min(y, 1 - y) up to 1/2, as csrc does: 8 multiply-adds, and a minimum, a maximum and an addition for the sign of x
//   degree 4, 3    of y below 1/16, where all eight logits of a vector lie below: 4 or 3 multiply-adds; else the above
//
// Relative error of y times the polynomial in float32: degree 8 1.6e-7; degree 4 1.2e-7; degree 3 1.5e-7 (in exact arithmetic 6e-10 and
// 3.3e-8). A warp with a vector of each kind pays for both.
#pragma once
#include "../../csrc/detection_loss/detection_loss_kernel.cuh"
#include "launch_plan.h"

namespace ef::variants {
using bf16 = c10::BFloat16;
inline constexpr auto kGamma = focal_loss::Modulator::kThreeHalves;
inline constexpr int kLossThreads = detection_loss::kThreads, kLossSteps = detection_loss::kSteps, kLogits = kVecSize<bf16>;
using Logits = Vec<bf16, kLogits>;

// -log(1 - s) for 0 <= s < 1/16: the polynomials of least relative error that are 1 at 0.
template <int kDegree, typename T>
EF_HD T minus_log1m_low(T s) {
  static_assert(kDegree == 3 || kDegree == 4);
  if constexpr (kDegree == 4) {
    T p = T(0.227763459f);
    p = p * s + T(0.248499244f);
    p = p * s + T(0.333364844f);
    p = p * s + T(0.499999791f);
    return (p * s + T(1)) * s;
  } else {
    T p = T(0.275834382f);
    p = p * s + T(0.33237496f);
    p = p * s + T(0.500009954f);
    return (p * s + T(1)) * s;
  }
}

__device__ inline uint32_t smaller_halves(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return __vminu2(a, b);
#else
  const uint32_t low = (a & 0xffff) < (b & 0xffff) ? a : b, high = (a >> 16) < (b >> 16) ? a : b;
  return (low & 0xffff) | (high & 0xffff0000u);
#endif
}
// Whether every y is below 1/16, from the bits of x: negative numbers from -2.71875 down, as unsigned halves from 0xc02e up (so are
// negative NaN, of which either way makes NaN).
__device__ inline bool all_low(const Logits& x) {
  constexpr uint32_t kBar = 0xc02e;
  uint32_t words[kLogits / 2];
  std::memcpy(words, &x, sizeof(words));
  uint32_t least = words[0];
#pragma unroll
  for (int i = 1; i < kLogits / 2; ++i) least = smaller_halves(least, words[i]);
  return (least & 0xffff) >= kBar && least >= kBar << 16;
}

// focal_loss::background where all are low.
template <int kDegree>
__device__ float low_background(const Logits& x, const focal_loss::Parameters<float>& p, const focal_loss::Slope<float>& slope,
                                Logits& grad) {
  float sum = 0, values[kLogits];
  Packed<bf16, kLogits> words;
  std::memcpy(&words, &x, sizeof(words));
  unpack(words, values);
#pragma unroll
  for (int k = 0; k < kLogits; ++k) {
    const float z = values[k], e = bounded_exp(-z), y = quotient_of(1.f, 1.f + e);
    const float cross_entropy = minus_log1m_low<kDegree>(y) - z * (0.5f * p.smoothing), power = y * sqrt_of(y);
    sum += power * cross_entropy;
    grad.v[k] = bf16(power * (slope.gamma * (e * y) * cross_entropy + (slope.unit * y - slope.half_smoothing)));
  }
  return sum;
}

struct LossProblem {
  int64_t rows, classes;  // rows * classes % 8 == 0, classes >= 8
  focal_loss::Parameters<float> focal;
  float scale;  // of the gradient
};

// partials[block]: the sum of the block's losses. Shared memory: one float a warp.
template <int kDegree>
__global__ void loss_kernel(LossProblem in, const bf16* __restrict__ logits, const int32_t* __restrict__ labels, bf16* __restrict__ grads,
                            float* __restrict__ partials) {
  constexpr int64_t kTile = int64_t(kLossThreads) * kLossSteps * kLogits;
  const int classes = int(in.classes);
  const int64_t n = in.rows * classes, tiles = ceil_div(n, kTile);
  const auto stride = focal_loss::Stride::of(kLossThreads * kLogits, classes);
  const focal_loss::Slope<float> slope(in.focal, in.scale * in.focal.alpha_negative);
  float of_background = 0, of_labeled = 0;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    int64_t i = tile * kTile + threadIdx.x * kLogits;
    auto at = focal_loss::Place<int32_t, int>::of(labels, i, classes);
#pragma unroll 1
    for (int step = 0; step < kLossSteps && i < n; ++step, i += kLossThreads * kLogits) {
      const Logits x = load_vec<kLogits>(logits + i);
      Logits grad;
      if (!focal_loss::all_background<kLogits>(at, classes)) {
        const auto marks = focal_loss::marks_of<kLogits>(at, classes);
        of_labeled += detection_loss::labeled<kGamma>(x, marks, in.focal, [](int) { return 1.f; }, in.scale, grad);
      } else if constexpr (kDegree == 8) {
        of_background += focal_loss::background<kGamma>(x, in.focal, slope, grad);
      } else {
        of_background +=
            all_low(x) ? low_background<kDegree>(x, in.focal, slope, grad) : focal_loss::background<kGamma>(x, in.focal, slope, grad);
      }
      store_vec<kLogits>(grads + i, grad);
      at.advance(stride, classes);
    }
  }
  const float sum = block_sum(in.focal.alpha_negative * of_background + of_labeled, shared_memory<float>());
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

inline int64_t loss_blocks(const LossProblem& in) {
  const int64_t tiles = ceil_div(in.rows * in.classes, int64_t(kLossThreads) * kLossSteps * kLogits);
  return tiles < 132 * 8 ? tiles : 132 * 8;
}

// f(name, launch plan) for each variant, the plain one first.
template <class F>
void each_loss(const LossProblem& in, F&& f) {
  const auto plan = [&]<int kDegree>() {
    return LaunchPlan{loss_kernel<kDegree>, dim3(unsigned(loss_blocks(in))), dim3(kLossThreads), kWarpSize * sizeof(float)};
  };
  f("degree 8", plan.template operator()<8>());
  f("degree 4", plan.template operator()<4>());
  f("degree 3", plan.template operator()<3>());
}
}  // namespace ef::variants
