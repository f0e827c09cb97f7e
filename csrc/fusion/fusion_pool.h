// Max-pooling of the CPU kernels, and its gradient, over runs of windows that have the values of each tap side by side: the channels of
// one window in channels_last; a line of windows in NCHW, whose columns are split by parity first. Each loop is compiled per
// instruction set.
#pragma once
#include "fusion.h"

namespace ef::fusion {
// A run's taps, in order. A tap outside the image repeats the one before it (the first ones the first inside): a value that comes
// twice in a row changes neither the maximum nor which tap counts.
template <typename T>
struct Window {
  const T* values[9];  // [run]
  acc_t<T> taps[9];    // their numbers, in the type of the maxima so that both fill one kind of vector

  // at(row, column): where the values of a tap inside an image [h, w] start; (top, left) is the first tap's place in it.
  template <class At>
  EF_HD Window(int64_t h, int64_t w, int64_t top, int64_t left, const At& at) {
    const int first = first_tap(top < 0, left < 0);
    int last = first;
    for (int i = 0; i < 9; ++i) {
      const int64_t row = top + i / 3, column = left + i % 3;
      if (row >= 0 && row < h && column >= 0 && column < w) last = i;
      taps[i] = acc_t<T>(last);
      values[i] = at(last / 3, last % 3);
    }
  }
};
template <typename scalar_t>
Window<scalar_t> window_of(const scalar_t* x, int64_t h, int64_t w, int64_t c, int64_t top, int64_t left) {
  return Window<scalar_t>(h, w, top, left, [&](int row, int column) { return x + ((top + row) * w + left + column) * c; });
}

// out[k] = the largest of the window's values; taps only where wanted.
template <bool kTaps, typename T>
EF_CPU_CLONES void pool_window(const Window<T> window, int64_t run, acc_t<T>* __restrict out, acc_t<T>* __restrict taps) {
  using A = acc_t<T>;
#pragma GCC ivdep
  for (int64_t k = 0; k < run; ++k) {
    A highest = A(window.values[0][k]);
    A tap = window.taps[0];
#pragma GCC unroll 8
    for (int i = 1; i < 9; ++i) {
      const A value = A(window.values[i][k]), number = window.taps[i];
      const bool take = is_new_maximum(value, highest);
      highest = take ? value : highest;
      if constexpr (kTaps) tap = take ? number : tap;
    }
    out[k] = highest;
    if constexpr (kTaps) taps[k] = tap;
  }
}

template <typename scalar_t>
EF_CPU_CLONES void split_by_parity(const scalar_t* __restrict line, int64_t m, acc_t<scalar_t>* __restrict even,
                                   acc_t<scalar_t>* __restrict odd) {
  for (int64_t j = 0; j < m; ++j) {
    even[j] = acc_t<scalar_t>(line[2 * j]);
    odd[j] = acc_t<scalar_t>(line[2 * j + 1]);
  }
}

// The m windows from (top, left) on along a line of an image of one channel; `lines` has room for 3 (2 m + 1) values.
template <bool kTaps, typename scalar_t>
void pool_line(const scalar_t* x, int64_t h, int64_t w, int64_t top, int64_t left, int64_t m, acc_t<scalar_t>* lines, acc_t<scalar_t>* out,
               acc_t<scalar_t>* taps) {
  using A = acc_t<scalar_t>;
  const int64_t begin = left < 0 ? 1 : 0;
  for (int row = 0; row < 3; ++row) {
    if (top + row < 0 || top + row >= h) continue;
    const scalar_t* line = x + (top + row) * w;
    A *even = lines + row * (2 * m + 1), *odd = even + m + 1;
    split_by_parity(line + left + 2 * begin, m - begin, even + begin, odd + begin);
    if (begin) {
      even[0] = A(-INFINITY);
      odd[0] = A(line[0]);
    }
    even[m] = left + 2 * m < w ? A(line[left + 2 * m]) : A(-INFINITY);
  }
  const Window<A> window(h, 3, top, 0, [&](int row, int column) {
    const A *even = lines + row * (2 * m + 1), *odd = even + m + 1;
    return column == 1 ? odd : even + column / 2;
  });
  pool_window<kTaps>(window, m, out, taps);
  // On the right what is outside is never a first tap, so that -infinity never counts; on the left it is.
  if (begin) pool_window<kTaps>(window_of(x, h, w, 1, top, left), 1, out, taps);
}

// Maxima of the windows (row, first + j), j < m, of the image x [h, w, c].
template <bool kTaps, typename scalar_t>
void pool_row(const scalar_t* x, int64_t h, int64_t w, int64_t c, int64_t row, int64_t first, int64_t m, acc_t<scalar_t>* lines,
              acc_t<scalar_t>* out, acc_t<scalar_t>* taps) {
  const int64_t top = 2 * row - pool_before(h), left = 2 * first - pool_before(w);
  if (c == 1) return pool_line<kTaps>(x, h, w, top, left, m, lines, out, taps);
  for (int64_t j = 0; j < m; ++j)
    pool_window<kTaps>(window_of(x, h, w, c, top, left + 2 * j), c, out + j * c, kTaps ? taps + j * c : nullptr);
}

// The windows, along one axis, of which the place t is a tap, counted from the first tap of window 0: at most two.
struct Memberships {
  int count = 0;
  int64_t windows[2], taps[2];
  EF_HD explicit Memberships(int64_t t) {
    if (t % 2 == 0 && t > 0) add(t / 2 - 1, 2);
    add(t / 2, t % 2);
  }

 private:
  EF_HD void add(int64_t window, int64_t tap) {
    windows[count] = window;
    taps[count++] = tap;
  }
};

// What some windows give to a pixel: each where its tap has the number that the pixel has in it.
template <int kCount, typename scalar_t>
EF_HD void receive(const scalar_t* const (&grads)[4], const uint8_t* const (&taps)[4], const uint8_t (&numbers)[4], int64_t c,
                   acc_t<scalar_t> factor, scalar_t* __restrict out) {
  using A = acc_t<scalar_t>;
#pragma GCC ivdep
  for (int64_t k = 0; k < c; ++k) {
    A sum = 0;
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      const A grad = A(grads[i][k]);
      sum += taps[i][k] == numbers[i] ? grad : A(0);
    }
    out[k] = scalar_t(factor * sum);
  }
}

// grad_x of one input row [w, c], which is tap ky[i] of the rows [m, c] of windows given.
template <int kRows, typename scalar_t>
EF_CPU_CLONES void unpool_row(const scalar_t* const grads[2], const uint8_t* const taps[2], const int64_t ky[2], int64_t w, int64_t m,
                              int64_t c, acc_t<scalar_t> factor, scalar_t* out) {
  constexpr uint8_t kNever = 255;
  const int64_t before = pool_before(w);
  for (int64_t j = 0; j < m; ++j) {
    const scalar_t* from[4] = {};
    const uint8_t* tap[4] = {};
    uint8_t number[4] = {};
    for (int i = 0; i < kRows; ++i) {
      from[i] = grads[i] + j * c;
      tap[i] = taps[i] + j * c;
      number[i] = uint8_t(3 * ky[i] + 1);
    }
    scalar_t* pixel = out + (2 * j + 1 - before) * c;
    receive<kRows>(from, tap, number, c, factor, pixel);
    if (j == 0 && before) continue;
    for (int i = 0; i < kRows; ++i) {
      const int64_t last = j > 0 ? j - 1 : j;
      number[i] = uint8_t(3 * ky[i]);
      from[kRows + i] = grads[i] + last * c;
      tap[kRows + i] = taps[i] + last * c;
      number[kRows + i] = j > 0 ? uint8_t(3 * ky[i] + 2) : kNever;
    }
    receive<2 * kRows>(from, tap, number, c, factor, pixel - c);
  }
}

// The same of an image of one channel. A place is the first tap of window t / 2 and the last of the one before when t is even, the
// middle tap of window t / 2 when it is odd: even[t / 2], odd[t / 2]. This adds what row `ky` of the taps of m windows gets; even has
// room for m + 1.
template <typename scalar_t>
EF_CPU_CLONES void unpool_line(const scalar_t* __restrict grad, const uint8_t* __restrict taps, int ky, int64_t m,
                               acc_t<scalar_t>* __restrict even, acc_t<scalar_t>* __restrict odd) {
  using A = acc_t<scalar_t>;
  const int first = 3 * ky;
  for (int64_t j = 0; j < m; ++j) {
    even[j] += taps[j] == first ? A(grad[j]) : A(0);
    odd[j] += taps[j] == first + 1 ? A(grad[j]) : A(0);
  }
  for (int64_t j = 0; j < m; ++j) even[j + 1] += taps[j] == first + 2 ? A(grad[j]) : A(0);
}
template <typename scalar_t>
EF_CPU_CLONES void interleave(const acc_t<scalar_t>* __restrict even, const acc_t<scalar_t>* __restrict odd, acc_t<scalar_t> factor,
                              int64_t w, scalar_t* __restrict out) {
  const int64_t before = pool_before(w);
  if (before) out[0] = scalar_t(factor * odd[0]);
  even += before;
  odd += before;
  out += before;
  for (int64_t j = 0; j < (w - before) / 2; ++j) {
    out[2 * j] = scalar_t(factor * even[j]);
    out[2 * j + 1] = scalar_t(factor * odd[j]);
  }
}
}  // namespace ef::fusion
