// What the fusion's kernels share: which pixels fall to a thread, and vectors of values in the type they are computed in.
#pragma once

#include "../common/launch.cuh"
#include "../common/vec.cuh"
#include "fusion.h"

namespace ef::fusion {
inline constexpr int kThreads = 256;  // of a block

// Calls f(row, x, channel) for the pixels of `rows` rows [w, c] that fall to this thread: one vector of channels at a fixed column, down
// the rows, so that the column's arithmetic is done once and neighboring lanes read neighboring addresses.
template <int kVec, class F>
__device__ void for_each_pixel(int64_t rows, int64_t w, int64_t c, F&& f) {
  const int64_t vectors = c / kVec;
  for (int64_t column = int64_t(blockIdx.y) * blockDim.x + threadIdx.x; column < w * vectors; column += int64_t(gridDim.y) * blockDim.x) {
    const int64_t x = quotient(column, vectors), channel = (column - x * vectors) * kVec;
#pragma unroll 1
    for (int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; row < rows; row += int64_t(gridDim.x) * blockDim.y)
      f(row, x, channel);
  }
}

template <typename A, int kVec>
struct Values {
  A v[kVec];
};
template <int kVec, typename scalar_t>
__device__ Values<acc_t<scalar_t>, kVec> unpacked(const Packed<scalar_t, kVec>& packed) {
  Values<acc_t<scalar_t>, kVec> result;
  unpack(packed, result.v);
  return result;
}
template <int kVec, typename scalar_t>
__device__ Values<acc_t<scalar_t>, kVec> load_values(const scalar_t* p) {
  return unpacked<kVec, scalar_t>(load_packed<kVec>(p));
}
template <int kVec, typename scalar_t>
__device__ void store_values(scalar_t* p, const Values<acc_t<scalar_t>, kVec>& value, acc_t<scalar_t> factor) {
  Vec<scalar_t, kVec> raw;
#pragma unroll
  for (int k = 0; k < kVec; ++k) raw.v[k] = scalar_t(factor * value.v[k]);
  store_vec<kVec>(p, raw);
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

// This block's part of what the weights' gradient is made of: [blocks, kCount].
template <int kCount, typename A>
__device__ void store_partials(A (&dots)[kCount], int count, A* partials) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i >= count) continue;
    dots[i] = block_sum(dots[i], shared_memory<A>() + i * kWarpSize);
    if (threadIdx.x == 0 && threadIdx.y == 0) partials[(int64_t(blockIdx.y) * gridDim.x + blockIdx.x) * count + i] = dots[i];
  }
}
}  // namespace ef::fusion
