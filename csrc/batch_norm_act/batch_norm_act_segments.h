// How the CPU kernels cut x, and their loops over one segment; each loop is compiled per instruction set. x is a row of segments, of a
// size that depends on the shape only: some pixels of channels_last, or a piece of a plane of NCHW. The loops run over `width` lanes at
// a time, each lane with the constants and sums of its channel beside it: as many pixels as fill the vectors, or one channel many
// times. So one set of loops serves both layouts and any number of channels.
#pragma once
#include <algorithm>
#include <array>

#include "../common/scratch.h"
#include "batch_norm_act.h"

namespace ef::batch_norm_act {
inline constexpr int64_t kSegment = 1 << 15;
inline constexpr int64_t kLanes = 64;

struct Segment {
  int64_t offset, count, channel, index;  // from `offset` on `count` elements; `channel` is that of the first; its partials are `index`
};

struct Segments {
  int64_t width, size, per_plane, count;  // lanes; elements of a segment; of a plane (NCHW); all that have partials
  explicit Segments(const Shape& s) {
    if (s.inner == 1) {
      int64_t pixels = 1;  // that fill whole vectors
      while (pixels < 16 && pixels * s.c < 4 * kLanes && (pixels * s.c < kLanes || pixels * s.c % 16)) ++pixels;
      width = pixels * s.c;
      size = width * std::max<int64_t>(1, kSegment / width);
      per_plane = 0;
      count = ceil_div(s.n * s.c, size);
    } else {
      width = std::min(s.inner, kLanes);
      size = kSegment;
      per_plane = ceil_div(s.inner, size);
      count = s.n * per_plane;
    }
  }
  Segment of_pixels(const Shape& s, int64_t i) const { return {i * size, std::min(size, s.n * s.c - i * size), 0, i}; }
  Segment of_plane(const Shape& s, int64_t image, int64_t channel, int64_t i) const {
    return {(image * s.c + channel) * s.inner + i * size, std::min(size, s.inner - i * size), channel, image * per_plane + i};
  }
  int64_t values(const Shape& s, int64_t i) const {  // per channel
    return s.inner == 1 ? of_pixels(s, i).count / s.c : of_plane(s, 0, 0, i % per_plane).count;
  }
};

template <typename scalar_t>
EF_CPU_CLONES void medians(const scalar_t* a, const scalar_t* b, const scalar_t* c, int64_t count, acc_t<scalar_t>* __restrict out) {
  using A = acc_t<scalar_t>;
  for (int64_t j = 0; j < count; ++j) out[j] = median(A(a[j]), A(b[j]), A(c[j]));
}

// An exponential is a long chain of dependent operations: two vectors' chains side by side keep the units busy.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC optimize("schedule-insns", "unroll-loops")
#endif
template <typename scalar_t>
EF_CPU_CLONES void add_moments(const scalar_t* __restrict x, int64_t count, int64_t width, const acc_t<scalar_t>* __restrict pivot,
                               acc_t<scalar_t>* __restrict sum, acc_t<scalar_t>* __restrict squares) {
  using A = acc_t<scalar_t>;
  int64_t i = 0;
  for (; i + 4 * width <= count; i += 4 * width) {
    const scalar_t* __restrict row = x + i;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) {
      const A p = pivot[j], a = A(row[j]) - p, b = A(row[width + j]) - p, c = A(row[2 * width + j]) - p, d = A(row[3 * width + j]) - p;
      sum[j] += (a + b) + (c + d);
      squares[j] += (a * a + b * b) + (c * c + d * d);
    }
  }
  for (; i < count; i += width) {
    const int64_t lanes = std::min(width, count - i);
#pragma omp simd
    for (int64_t j = 0; j < lanes; ++j) {
      const A d = A(x[i + j]) - pivot[j];
      sum[j] += d;
      squares[j] += d * d;
    }
  }
}

template <Activation kActivation, typename scalar_t>
EF_CPU_CLONES void normalise(const scalar_t* __restrict x, int64_t count, int64_t width, const acc_t<scalar_t>* __restrict mean,
                             const acc_t<scalar_t>* __restrict scale, const acc_t<scalar_t>* __restrict bias, scalar_t* __restrict y) {
  using A = acc_t<scalar_t>;
  for (int64_t i = 0; i < count; i += width) {
    const int64_t lanes = std::min(width, count - i);
#pragma omp simd
    for (int64_t j = 0; j < lanes; ++j) y[i + j] = scalar_t(value<kActivation>(A(x[i + j]), mean[j], scale[j], bias[j]));
  }
}

template <Activation kActivation, bool kKeep, typename scalar_t>
EF_CPU_CLONES void add_gradients(const scalar_t* __restrict grad, const scalar_t* __restrict x, int64_t count, int64_t width,
                                 const acc_t<scalar_t>* __restrict mean, const acc_t<scalar_t>* __restrict scale,
                                 const acc_t<scalar_t>* __restrict bias, acc_t<scalar_t>* __restrict sum,
                                 acc_t<scalar_t>* __restrict products, scalar_t* __restrict kept) {
  using A = acc_t<scalar_t>;
  for (int64_t i = 0; i < count; i += width) {
    const int64_t lanes = std::min(width, count - i);
#pragma omp simd
    for (int64_t j = 0; j < lanes; ++j) {
      const A distance = A(x[i + j]) - mean[j], g = grad_normalized<kActivation>(A(grad[i + j]), distance, scale[j], bias[j]);
      sum[j] += g;
      products[j] += g * distance;
      if constexpr (kKeep) kept[i + j] = scalar_t(g);
    }
  }
}

template <Activation kActivation, typename scalar_t>
EF_CPU_CLONES void input_gradients(const scalar_t* grad, const scalar_t* __restrict x, int64_t count, int64_t width,
                                   const acc_t<scalar_t>* __restrict mean, const acc_t<scalar_t>* __restrict scale,
                                   const acc_t<scalar_t>* __restrict bias, const acc_t<scalar_t>* __restrict shift,
                                   const acc_t<scalar_t>* __restrict slope, scalar_t* grad_x) {  // may be grad
  using A = acc_t<scalar_t>;
  for (int64_t i = 0; i < count; i += width) {
    const int64_t lanes = std::min(width, count - i);
#pragma omp simd
    for (int64_t j = 0; j < lanes; ++j) {
      const A distance = A(x[i + j]) - mean[j], g = grad_normalized<kActivation>(A(grad[i + j]), distance, scale[j], bias[j]);
      grad_x[i + j] = scalar_t(scale[j] * g + (shift[j] + slope[j] * distance));
    }
  }
}

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif

// The sums of a channel's lanes, to [c] or, for a plane, to its one channel.
template <typename A>
void fold(const A* lanes, int64_t width, const Shape& s, int64_t channel, A* out) {
  if (s.inner == 1) {
    std::copy_n(lanes, s.c, out);
    for (int64_t i = s.c; i < width; i += s.c)
      for (int64_t c = 0; c < s.c; ++c) out[c] += lanes[i + c];
    return;
  }
  A total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < width; ++j) total += lanes[j];
  out[channel] = total;
}

// rows[k, lane] = values(channel of the lane)[k], for the lanes of a segment that starts with `channel`.
template <typename A, class F>
void fill_lanes(A* rows, int64_t width, const Shape& s, int64_t channel, const F& values) {
  if (s.inner > 1) {
    for (const A value : values(channel)) {
      std::fill_n(rows, width, value);
      rows += width;
    }
    return;
  }
  for (int64_t c = 0; c < s.c; ++c) {
    A* row = rows;
    for (const A value : values(c)) {
      for (int64_t lane = c; lane < width; lane += s.c) row[lane] = value;
      row += width;
    }
  }
}
}  // namespace ef::batch_norm_act
