// Max-pooling of the fusion's kernels, of kernel 3 and stride 2, and its gradient.
//
//   tap      (0,0) (0,1) (0,2)         a thread owns a window, and of the input the four pixels at its taps (0,0) to (1,1), which only
//            (1,0) (1,1) (1,2)         this window and the ones above and to the left of it cover: together the threads own every
//            (2,0) (2,1) (2,2)         pixel of the input once
#pragma once

#include "fusion_vector.cuh"
#include "fusion_words.h"

namespace ef::fusion {
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
  for (int i = 0; i < 9; ++i) {
    const int64_t row = top + i / 3, column = left + i % 3;
    if (row < 0 || row >= in.h || column < 0 || column >= in.w) continue;
    const Values<A, kVec> value = load_values<kVec>(source + (row * in.w + column) * c);
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      if (is_new_maximum(value.v[k], highest.v[k])) {
        highest.v[k] = value.v[k];
        tap.v[k] = uint8_t(i);
      }
    }
  }
  if (taps) store_vec<kVec>(taps, tap);
  return highest;
}

// The vectors of a window, each tap outside the image as its neighbor inside.
template <int kVec, typename scalar_t>
struct Window {
  static constexpr int kWords = kVec * sizeof(scalar_t) / 4;
  Packed<scalar_t, kVec> taps[3][3];
  uint32_t row_inside, column_inside;

  // Window (y, x) of the image `source` [h, w, c], already at its channel.
  __device__ Window(const scalar_t* source, const Input<scalar_t>& in, int64_t c, int64_t y, int64_t x) {
    const int64_t top = 2 * y - pool_before(in.h), left = 2 * x - pool_before(in.w);
    row_inside = top < 0 ? 0u : ~0u;
    column_inside = left < 0 ? 0u : ~0u;
    const scalar_t* center = source + ((top + 1) * in.w + left + 1) * c;  // which is inside
    const int64_t rows[3] = {top < 0 ? 0 : -in.w * c, 0, top + 2 < in.h ? in.w * c : 0};
    const int64_t columns[3] = {left < 0 ? 0 : -c, 0, left + 2 < in.w ? c : 0};
#pragma unroll
    for (int i = 0; i < 9; ++i) taps[i / 3][i % 3] = load_packed<kVec>(center + rows[i / 3] + columns[i % 3]);
  }

  // False where there is a NaN; then no result holds.
  template <bool kTaps>
  __device__ bool maximum(Packed<scalar_t, kVec>& highest, Vec<uint8_t, kVec>& numbers) const {
    uint32_t values[kWords], are_numbers = ~0u;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      uint32_t v[3][3];
#pragma unroll
      for (int k = 0; k < 9; ++k) std::memcpy(&v[k / 3][k % 3], &taps[k / 3][k % 3].words.v[i], 4);
      const Maximum found = maximum_of<kTaps, scalar_t>(v, row_inside, column_inside);
      are_numbers &= is_equal<scalar_t>(found.value, found.value);
      values[i] = found.value;
#pragma unroll
      for (int k = 0; kTaps && k < kVec / kWords; ++k) numbers.v[kVec / kWords * i + k] = uint8_t(found.tap >> 16 * k);
    }
    std::memcpy(&highest, values, sizeof(values));
    return are_numbers == ~0u;
  }
};

template <int kVec>
__device__ int tap_of(const Packed<uint8_t, kVec>& taps, int k) {
  if constexpr (kVec % 4 == 0) return taps.words.v[k / 4] >> k % 4 * 8 & 0xff;
  return taps.words.v[k];
}

template <int kVec, typename scalar_t>
__global__ __launch_bounds__(kThreads, 2) void fusion_max_pool_backward_kernel(Problem<scalar_t> p, int input,
                                                                               const scalar_t* __restrict__ grad_sum,  // [n, h, w, c]
                                                                               const uint8_t* __restrict__ taps,       // [n, h, w, c]
                                                                               int64_t h, int64_t w,
                                                                               scalar_t* __restrict__ grad_input) {  // [n, of h, of w, c]
  using A = acc_t<scalar_t>;
  const A weight = Normalizer<A>(p.weights, p.count, p.method, p.eps).weight(p.weights, input);
  for_each_pixel<kVec>(p.n * p.h, p.w, p.c, [&](int64_t window_row, int64_t x, int64_t channel) {
    const int64_t image = quotient(window_row, p.h), y = window_row - image * p.h;
    const int64_t at = (window_row * p.w + x) * p.c + channel, above = y > 0 ? p.w * p.c : 0, before = x > 0 ? p.c : 0;
    Packed<scalar_t, kVec> grads[2][2];
    Packed<uint8_t, kVec> numbers[2][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      grads[i / 2][i % 2] = load_packed<kVec>(grad_sum + at - i / 2 * above - i % 2 * before);
      numbers[i / 2][i % 2] = load_packed<kVec>(taps + at - i / 2 * above - i % 2 * before);
    }
    Values<A, kVec> sums[2][2] = {};
#pragma unroll
    for (int up = 0; up < 2; ++up) {
#pragma unroll
      for (int left = 0; left < 2; ++left) {
        const bool is_inside = y >= up && x >= left;
        const Values<A, kVec> grad = unpacked<kVec, scalar_t>(is_inside ? grads[up][left] : Packed<scalar_t, kVec>{});
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
          const int tap = tap_of<kVec>(numbers[up][left], k);
#pragma unroll
          for (int a = 0; a < 2 - up; ++a) {  // of a window above only the last row of taps is owned here, as this window's first
#pragma unroll
            for (int b = 0; b < 2 - left; ++b)
              if (tap == 3 * (a + 2 * up) + b + 2 * left) sums[a][b].v[k] += grad.v[k];
          }
        }
      }
    }
    const int64_t top = 2 * y - pool_before(h), left = 2 * x - pool_before(w);
    const int64_t first = ((image * h + top) * w + left) * p.c + channel;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (top + i / 2 < 0 || left + i % 2 < 0) continue;
      store_values<kVec>(grad_input + first + (i / 2 * w + i % 2) * p.c, sums[i / 2][i % 2], weight);
    }
  });
}
}  // namespace ef::fusion
