// Loops of the CPU kernels over short runs of elements that stay in the first-level cache; each is compiled per instruction set.
#pragma once

#include "fusion.h"

namespace ef::fusion {
template <typename scalar_t, typename out_t>
EF_CPU_CLONES void convert(const scalar_t* __restrict x, int64_t m, out_t* __restrict out) {
  for (int64_t j = 0; j < m; ++j) out[j] = out_t(x[j]);
}

// out[j, :] = x[columns[j], :]
template <typename scalar_t>
EF_CPU_CLONES void nearest_row(const scalar_t* __restrict x, const int32_t* __restrict columns, int64_t m, int64_t c,
                               acc_t<scalar_t>* __restrict out) {
  using A = acc_t<scalar_t>;
  if (c == 1) {
    for (int64_t j = 0; j < m; ++j) out[j] = A(x[columns[j]]);
    return;
  }
  for (int64_t j = 0; j < m; ++j)
    for (int64_t k = 0; k < c; ++k) out[j * c + k] = A(x[columns[j] * c + k]);
}

// One window's taps, in order. A tap outside the image repeats the one before it (the first ones the first inside): a value that comes
// twice in a row changes neither the maximum nor which tap counts.
template <typename scalar_t>
struct Window {
  const scalar_t* pixels[9];  // [c]
  acc_t<scalar_t> taps[9];    // their numbers, in the type of the maxima so that both fill one kind of vector

  EF_HD Window(const scalar_t* x, int64_t h, int64_t w, int64_t c, int64_t top, int64_t left) {
    const int first = first_tap(top < 0, left < 0);
    int last = first;
    for (int i = 0; i < 9; ++i) {
      const int64_t row = top + i / 3, column = left + i % 3;
      if (row >= 0 && row < h && column >= 0 && column < w) last = i;
      taps[i] = acc_t<scalar_t>(last);
      pixels[i] = x + ((top + last / 3) * w + left + last % 3) * c;
    }
  }
};

// out[k] = the largest of the window's values; taps only where wanted.
template <bool kTaps, typename scalar_t>
EF_CPU_CLONES void pool_window(const Window<scalar_t> window, int64_t c, acc_t<scalar_t>* __restrict out,
                               acc_t<scalar_t>* __restrict taps) {
  using A = acc_t<scalar_t>;
#pragma GCC ivdep
  for (int64_t k = 0; k < c; ++k) {
    A highest = A(window.pixels[0][k]);
    A tap = window.taps[0];
#pragma GCC unroll 8
    for (int i = 1; i < 9; ++i) {
      const A value = A(window.pixels[i][k]), number = window.taps[i];
      const bool take = is_new_maximum(value, highest);
      highest = take ? value : highest;
      if constexpr (kTaps) tap = take ? number : tap;
    }
    out[k] = highest;
    if constexpr (kTaps) taps[k] = tap;
  }
}

// The same of m windows along a line of an image of one channel: all at one tap after the other.
template <bool kTaps, typename scalar_t>
EF_CPU_CLONES void pool_line(const scalar_t* __restrict x, int64_t h, int64_t w, int64_t top, int64_t left, int64_t m,
                             acc_t<scalar_t>* __restrict out, acc_t<scalar_t>* __restrict taps) {
  using A = acc_t<scalar_t>;
  for (int64_t j = 0; j < m; ++j) out[j] = A(-INFINITY);
  if constexpr (kTaps) {
    for (int64_t j = 0; j < m; ++j) taps[j] = A(first_tap(top < 0, left + 2 * j < 0));
  }
  for (int ky = 0; ky < 3; ++ky) {
    if (top + ky < 0 || top + ky >= h) continue;
    for (int kx = 0; kx < 3; ++kx) {
      const int64_t begin = left + kx < 0 ? 1 : 0, end = left + kx + 2 * (m - 1) >= w ? m - 1 : m;
      const scalar_t* __restrict line = x + (top + ky) * w + left + kx;
      for (int64_t j = begin; j < end; ++j) {
        const A value = A(line[2 * j]), highest = out[j];
        const bool take = is_new_maximum(value, highest);
        out[j] = take ? value : highest;
        if constexpr (kTaps) taps[j] = take ? A(3 * ky + kx) : taps[j];
      }
    }
  }
}

// Maxima of the windows (row, first + j), j < m, of the image x [h, w, c].
template <bool kTaps, typename scalar_t>
void pool_row(const scalar_t* x, int64_t h, int64_t w, int64_t c, int64_t row, int64_t first, int64_t m, acc_t<scalar_t>* out,
              acc_t<scalar_t>* taps) {
  const int64_t top = 2 * row - pool_before(h), left = 2 * first - pool_before(w);
  if (c == 1) return pool_line<kTaps>(x, h, w, top, left, m, out, taps);
  for (int64_t j = 0; j < m; ++j) {
    pool_window<kTaps>(Window<scalar_t>(x, h, w, c, top, left + 2 * j), c, out + j * c, kTaps ? taps + j * c : nullptr);
  }
}

// sum[j] = weights[0] rows[0][j] + ...
template <int kCount, typename A>
EF_CPU_CLONES void weighted_sum(const A* const* rows, const A* weights, int64_t m, A* __restrict sum) {
  const A w0 = weights[0], w1 = weights[1], w2 = kCount > 2 ? weights[2] : 0, w3 = kCount > 3 ? weights[3] : 0;
  const A* __restrict r0 = rows[0], * __restrict r1 = rows[1], * __restrict r2 = rows[kCount > 2 ? 2 : 0], * __restrict r3 = rows[kCount > 3 ? 3 : 0];
  for (int64_t j = 0; j < m; ++j) {
    A total = w0 * r0[j] + w1 * r1[j];
    if constexpr (kCount > 2) total += w2 * r2[j];
    if constexpr (kCount > 3) total += w3 * r3[j];
    sum[j] = total;
  }
}

template <Activation kActivation, typename scalar_t>
EF_CPU_CLONES void activate_row(const acc_t<scalar_t>* __restrict sum, int64_t m, scalar_t* __restrict out) {
  for (int64_t j = 0; j < m; ++j) out[j] = scalar_t(activate<kActivation>(sum[j]));
}
template <Activation kActivation, typename scalar_t>
EF_CPU_CLONES void activate_grad_row(const acc_t<scalar_t>* __restrict sum, const scalar_t* __restrict grad, int64_t m,
                                     acc_t<scalar_t>* __restrict out) {
  for (int64_t j = 0; j < m; ++j) out[j] = acc_t<scalar_t>(grad[j]) * activate_grad<kActivation>(sum[j]);
}

template <typename A>
EF_CPU_CLONES A dot(const A* __restrict a, const A* __restrict b, int64_t m) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < m; ++j) sum += a[j] * b[j];
  return sum;
}

template <typename A, typename out_t>
EF_CPU_CLONES void scale(const A* __restrict x, A factor, int64_t m, out_t* __restrict out) {
  for (int64_t j = 0; j < m; ++j) out[j] = out_t(factor * x[j]);
}

// parents[columns[j], :] += children[j, :]
template <typename T, typename A>
EF_CPU_CLONES void add_to_parents(const T* __restrict children, const int32_t* __restrict columns, int64_t m, int64_t c,
                                  A* __restrict parents) {
  if (c == 1) {
    for (int64_t j = 0; j < m; ++j) parents[columns[j]] += A(children[j]);
    return;
  }
  for (int64_t j = 0; j < m; ++j)
    for (int64_t k = 0; k < c; ++k) parents[columns[j] * c + k] += A(children[j * c + k]);
}

// One row of windows gives its gradient to the input row that is its tap row `ky`. A column t = x + pool_before is the first tap of
// window t / 2 and the last of the one before when t is even, the middle tap of window t / 2 when it is odd: even[t / 2], odd[t / 2].
// m = columns of windows times c; even has room for m + c.
template <typename scalar_t>
EF_CPU_CLONES void unpool_row(const scalar_t* __restrict grad, const uint8_t* __restrict taps, int ky, int64_t m, int64_t c,
                              acc_t<scalar_t>* __restrict even, acc_t<scalar_t>* __restrict odd) {
  using A = acc_t<scalar_t>;
  const int first = 3 * ky;
  for (int64_t j = 0; j < m; ++j) {
    even[j] += taps[j] == first ? A(grad[j]) : A(0);
    odd[j] += taps[j] == first + 1 ? A(grad[j]) : A(0);
  }
  for (int64_t j = 0; j < m; ++j) even[j + c] += taps[j] == first + 2 ? A(grad[j]) : A(0);
}
template <typename scalar_t>
EF_CPU_CLONES void interleave(const acc_t<scalar_t>* __restrict even, const acc_t<scalar_t>* __restrict odd, acc_t<scalar_t> factor,
                              int64_t w, int64_t c, scalar_t* __restrict out) {
  const int64_t before = pool_before(w);
  if (c == 1) {
    if (before) out[0] = scalar_t(factor * odd[0]);
    even += before;
    odd += before;
    out += before;
    for (int64_t j = 0; j < (w - before) / 2; ++j) {
      out[2 * j] = scalar_t(factor * even[j]);
      out[2 * j + 1] = scalar_t(factor * odd[j]);
    }
    return;
  }
  for (int64_t x = 0; x < w; ++x) {
    const acc_t<scalar_t>* __restrict source = ((x + before) % 2 ? odd : even) + (x + before) / 2 * c;
    for (int64_t k = 0; k < c; ++k) out[x * c + k] = scalar_t(factor * source[k]);
  }
}
}  // namespace ef::fusion
