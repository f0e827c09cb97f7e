// Max-pooling of the CPU kernels, and its gradient, over rows of windows that have the values of each tap side by side: the channels of
// one window in channels_last; a row of windows in NCHW, whose columns are split by parity on the way. Each loop is compiled per
// instruction set.
#pragma once
#include <algorithm>
#include <utility>

#include "../common/vector.h"
#include "fusion.h"

namespace ef::fusion {
// The taps of some windows, in order. A tap outside the image repeats the one before it (the first ones the first inside): a value that
// comes twice in a row changes neither the maximum nor which tap counts.
template <typename T>
struct Window {
  const T* values[9];  // [length]
  acc_t<T> taps[9];    // their numbers, in the type of the maxima: GCC selects both alike

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

// Vectors of values, and of tap numbers beside them.
template <typename A>
struct Lanes {
  using V = typename VectorOf<A>::type;
  using Numbers = decltype(V() < V());
  static constexpr int kCount = kLanes<V, A>;
  using Sequence = std::make_index_sequence<kCount>;
  typedef uint8_t Bytes __attribute__((vector_size(kCount)));
  typedef uint16_t Shorts __attribute__((vector_size(2 * kCount)));
};
// Between bytes and numbers, in steps of twice the size: GCC takes larger ones lane by lane.
template <typename To, typename Shorts, typename From>
EF_HD To converted(const From& v) {
  const auto shorts = __builtin_convertvector(v, Shorts);
  return __builtin_convertvector(shorts, To);
}

// Apart from the loops that seldom need it: inlined, it takes registers.
template <typename T>
__attribute__((noinline)) void copy_part(const T* from, int64_t count, T* to) {
  std::copy_n(from, count, to);
}
// The first `count` of a vector's lanes in memory; read, the others are zero.
template <typename scalar_t>
EF_HD auto load_part(const scalar_t* p, int64_t count) {
  constexpr int kCount = Lanes<acc_t<scalar_t>>::kCount;
  if (count == kCount) return load(p);
  scalar_t part[kCount] = {};
  copy_part(p, count, part);
  return load(part);
}
template <typename A>
EF_HD typename Lanes<A>::Numbers load_taps(const uint8_t* p, int64_t count) {
  using L = Lanes<A>;
  uint8_t part[L::kCount] = {};
  if (count < L::kCount) copy_part(p, count, part);
  return converted<typename L::Numbers, typename L::Shorts>(load<typename L::Bytes>(count < L::kCount ? part : p));
}
template <typename T, typename V>
EF_HD void store_part(T* p, const V& v, int64_t count) {
  constexpr int kCount = sizeof(V) / sizeof(v[0]);
  if (count == kCount) return store(p, v);
  T part[kCount];
  store(part, v);
  copy_part(part, count, p);
}
template <typename A>
EF_HD void store_taps(uint8_t* p, const typename Lanes<A>::Numbers& taps, int64_t count) {
  using L = Lanes<A>;
  store_part(p, converted<typename L::Bytes, typename L::Shorts>(taps), count);
}

// The largest value so far and the number of its tap.
template <typename V, typename Numbers>
struct Maximum {
  V value;
  Numbers tap;

  // As is_new_maximum; where there is no NaN one comparison will do.
  template <bool kNaN = true>
  EF_HD void see(const V& x, const Numbers& number) {
    const auto take = kNaN ? (x > value) | (x != x) : x > value;
    value = take ? x : value;
    tap = take ? number : tap;
  }
};
template <typename V>
EF_HD bool has_nan(const V& v) {
  const auto lanes = v != v;
  int64_t words[sizeof(V) / 8], any = 0;
  std::memcpy(words, &lanes, sizeof(V));
  for (const int64_t word : words) any |= word;
  return any != 0;
}

// Of the taps of a vector of windows: the maximum of each row by itself, then of the three: shorter chains than nine in a row.
template <bool kNaN, typename V, typename A>
EF_HD Maximum<V, V> maximum_of(const V (&values)[9], const A (&taps)[9]) {
  const V zero{};
  Maximum<V, V> maximum;
#pragma GCC unroll 3
  for (int i = 0; i < 9; i += 3) {
    Maximum<V, V> in_row{values[i], zero + taps[i]};
    in_row.template see<kNaN>(values[i + 1], zero + taps[i + 1]);
    in_row.template see<kNaN>(values[i + 2], zero + taps[i + 2]);
    i == 0 ? void(maximum = in_row) : maximum.template see<kNaN>(in_row.value, in_row.tap);
  }
  return maximum;
}

// out[k] = the largest of the window's values; taps only where wanted.
template <bool kTaps, typename T>
EF_CPU_CLONES void pool_window(const Window<T> window, int64_t length, acc_t<T>* __restrict out, uint8_t* __restrict taps) {
  using A = acc_t<T>;
  using V = typename Lanes<A>::V;
  constexpr int kCount = Lanes<A>::kCount;
  for (int64_t k = 0; k < length; k += kCount) {
    const int64_t count = std::min<int64_t>(kCount, length - k);
    V v[9];
#pragma GCC unroll 9
    for (int i = 0; i < 9; ++i) v[i] = load_part(window.values[i] + k, count);
    // A sum is NaN where one of its terms is; where infinities cancel it only takes the longer way.
    const bool nan = has_nan(((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7])) + v[8]);
    const Maximum<V, V> maximum = nan ? maximum_of<true>(v, window.taps) : maximum_of<false>(v, window.taps);
    store_part(out + k, maximum.value, count);
    if constexpr (kTaps) store_taps<A>(taps + k, __builtin_convertvector(maximum.tap, typename Lanes<A>::Numbers), count);
  }
}

// Maxima of the windows (row, first + j), j < m, of the image x [h, w, c].
template <bool kTaps, typename scalar_t>
void pool_row(const scalar_t* x, int64_t h, int64_t w, int64_t c, int64_t row, int64_t first, int64_t m, acc_t<scalar_t>* out,
              uint8_t* taps) {
  const int64_t top = 2 * row - pool_before(h), left = 2 * first - pool_before(w);
  for (int64_t j = 0; j < m; ++j)
    pool_window<kTaps>(window_of(x, h, w, c, top, left + 2 * j), c, out + j * c, kTaps ? taps + j * c : nullptr);
}

// Every kStep-th lane of a and b joined, from lane kFirst on.
template <int kFirst, int kStep, typename V, size_t... kLane>
EF_HD V picked(const V& a, const V& b, std::index_sequence<kLane...>) {
  return __builtin_shufflevector(a, b, (kFirst + kStep * int(kLane))...);
}
// Lanes of a and b in turns, from lane kFirst of each on.
template <int kFirst, typename V, size_t... kLane>
EF_HD V interleaved(const V& a, const V& b, std::index_sequence<kLane...>) {
  return __builtin_shufflevector(a, b, (kFirst + int(kLane / 2 + kLane % 2 * sizeof...(kLane)))...);
}

// The columns [column, column + m) of a row; -infinity outside. Apart from the loop that seldom needs it: inlined, it takes registers.
template <typename scalar_t>
__attribute__((noinline)) void copy_columns(const scalar_t* row, int64_t w, int64_t column, int m, acc_t<scalar_t>* out) {
  for (int k = 0; k < m; ++k) out[k] = column + k >= 0 && column + k < w ? acc_t<scalar_t>(row[column + k]) : -INFINITY;
}

// As pool_row for an image of one channel and its rows [row, end) of windows, from right to left: a window's last tap is the first of
// its neighbor to the right. Rows outside repeat their neighbor; columns outside are -infinity, which counts only as a first tap, so
// that this one has the number of the next. The maximum of each row by itself, then of the three: shorter chains than nine in a row.
template <bool kTaps, typename scalar_t>
EF_CPU_CLONES void pool_rows(const scalar_t* x, int64_t h, int64_t w, int64_t row, int64_t end, int64_t first, int64_t m,
                             acc_t<scalar_t>* out, uint8_t* taps) {
  using A = acc_t<scalar_t>;
  using V = typename Lanes<A>::V;
  using Numbers = typename Lanes<A>::Numbers;
  constexpr int kCount = Lanes<A>::kCount;
  const typename Lanes<A>::Sequence lanes;
  const int64_t left = 2 * first - pool_before(w), right = left + 2 * m;
  for (; row < end; ++row, out += m, taps += kTaps ? m : 0) {
    const int64_t top = 2 * row - pool_before(h);
    const scalar_t* rows[3];
    int numbers[3];  // of their first taps
    V next[3];
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
      const int64_t inside = std::min(std::max<int64_t>(i, -top), h - 1 - top);
      rows[i] = x + (top + inside) * w;
      numbers[i] = 3 * int(inside);
      next[i] = V{} + (right < w ? A(rows[i][right]) : A(-INFINITY));
    }
    for (int64_t j = (m - 1) / kCount * kCount; j >= 0; j -= kCount) {
      const int64_t column = left + 2 * j, count = std::min<int64_t>(kCount, m - j);
      Maximum<V, Numbers> maximum;
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) {
        V low, high;
        if (column >= 0 && column + 2 * kCount <= w) {
          low = load(rows[i] + column);
          high = load(rows[i] + column + kCount);
        } else {
          A padded[2 * kCount];
          copy_columns(rows[i], w, column, 2 * kCount, padded);
          low = load(padded);
          high = load(padded + kCount);
        }
        const Numbers number = Numbers{} + numbers[i];
        const V even = picked<0, 2>(low, high, lanes), odd = picked<1, 2>(low, high, lanes), last = picked<1, 1>(even, next[i], lanes);
        next[i] = even;
        Maximum<V, Numbers> in_row{even, number};
        if (i == 0 && column < 0) in_row.tap[0] += 1;
        in_row.see(odd, number + 1);
        in_row.see(last, number + 2);
        i == 0 ? void(maximum = in_row) : maximum.see(in_row.value, in_row.tap);
      }
      store_part(out + j, maximum.value, count);
      if constexpr (kTaps) store_taps<A>(taps + j, maximum.tap, count);
    }
  }
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

template <typename V, typename Numbers>
EF_HD V given(const V& grad, const Numbers& taps, int number) {
  return taps == number ? grad : V{};
}

// As unpool_row for an image of one channel: the rows at the first two tap rows of its windows' rows [row, end). A place in an even
// column is the first tap of one window and the last of its neighbor to the left, in an odd column the middle tap of one.
template <typename scalar_t>
EF_CPU_CLONES void unpool_rows(const scalar_t* grad, const uint8_t* taps, int64_t row, int64_t end, int64_t m, int64_t h, int64_t w,
                               acc_t<scalar_t> factor, scalar_t* out) {
  using A = acc_t<scalar_t>;
  using V = typename Lanes<A>::V;
  using Numbers = typename Lanes<A>::Numbers;
  constexpr int kCount = Lanes<A>::kCount, kNever = 255;
  const typename Lanes<A>::Sequence lanes;
  const int64_t before = pool_before(w);
  for (; row < end; ++row) {
    const int64_t above = row > 0 ? m : 0, upper = 2 * row - pool_before(h);
    const int number = row > 0 ? 6 : kNever;  // of the first tap that the windows above have in the upper row
    V left[2] = {};                           // what the last taps of the windows to the left get
    for (int64_t j = 0; j < m; j += kCount) {
      const int64_t at = row * m + j, count = std::min<int64_t>(kCount, m - j);
      const V a = load_part(grad + at - above, count), g = load_part(grad + at, count);
      const Numbers s = load_taps<A>(taps + at - above, count), t = load_taps<A>(taps + at, count);
      const V last[2] = {given(g, t, 2) + given(a, s, number + 2), given(g, t, 5)};
      const V even[2] = {given(g, t, 0) + given(a, s, number) + picked<kCount - 1, 1>(left[0], last[0], lanes),
                         given(g, t, 3) + picked<kCount - 1, 1>(left[1], last[1], lanes)};
      const V odd[2] = {given(g, t, 1) + given(a, s, number + 1), given(g, t, 4)};
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        left[i] = last[i];
        if (upper + i < 0) continue;
        const V low = factor * interleaved<0>(even[i], odd[i], lanes), high = factor * interleaved<kCount / 2>(even[i], odd[i], lanes);
        const int64_t column = 2 * j - before;
        scalar_t* to = out + (upper + i) * w + column;
        if (count == kCount && column >= 0) {
          store(to, low);
          store(to + kCount, high);
          continue;
        }
        scalar_t part[2 * kCount];
        store(part, low);
        store(part + kCount, high);
        const int64_t skipped = column < 0 ? 1 : 0;
        copy_part(part + skipped, 2 * count - skipped, to + skipped);
      }
    }
  }
}
}  // namespace ef::fusion
