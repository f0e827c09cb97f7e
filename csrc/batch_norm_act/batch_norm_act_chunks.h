// How the CPU kernels cut x, and their loops over a span of it; each loop is compiled per instruction set. A chunk, whose sums become
// partials, is some pixels of channels_last, or of NCHW the planes of some images or a piece of a plane; its size depends on the shape
// only. The passes take it in pieces: all of it, or in NCHW a few channels. The loops run over `width` lanes at a time, each with a sum of
// its own: as many pixels as fill the vectors, or one channel many times. Its constants lie beside it (a pointer), or are `Same` in all.
#pragma once
#include <algorithm>
#include <array>

#include "../common/parallel.h"
#include "../common/vector.h"
#include "batch_norm_act.h"

namespace ef::batch_norm_act {
inline constexpr int64_t kChunk = 1 << 15;
inline constexpr int64_t kSpan = 1 << 11;  // fewer elements in one place of NCHW at a time lose the prefetcher
inline constexpr int64_t kLanes = 64;

// Spans of consecutive elements: one of all channels in channels_last, else one of each channel in each image.
struct Piece {
  int64_t offset, count;  // of the first span
  int64_t images, channel, channels;
  int64_t chunk;
};

struct Chunks {
  int64_t width;             // lanes of a loop
  int64_t lanes;             // that constants are kept for: a loop's in channels_last, else one a channel
  int64_t size;              // elements of a span
  int64_t images, channels;  // of a piece
  int64_t per_plane, count;  // chunks: of a plane (0 in channels_last), all
  explicit Chunks(const Shape& s) {
    if (s.inner == 1) {
      int64_t pixels = 1;  // that fill whole vectors
      while (pixels < 16 && pixels * s.c < 4 * kLanes && (pixels * s.c < kLanes || pixels * s.c % 16)) ++pixels;
      width = lanes = pixels * s.c;
      size = width * std::max<int64_t>(1, kChunk / width);
      images = 1;
      channels = s.c;
      per_plane = 0;
      count = ceil_div(s.n * s.c, size);
    } else {
      width = std::min(s.inner, kLanes);
      lanes = s.c;
      size = std::min(s.inner, kChunk);
      images = std::clamp<int64_t>(kChunk / s.inner, 1, s.n);
      channels = std::min({s.c, std::max(ceil_div(kSpan, s.inner), kChunk / s.values()), kLanes});
      per_plane = ceil_div(s.inner, size);
      count = ceil_div(s.n, images) * per_plane;
    }
  }
  // For passes without sums, which may go through NCHW in the order of memory.
  static Chunks image_by_image(const Shape& s) {
    Chunks chunks(s);
    if (chunks.per_plane) {
      chunks.images = 1;
      chunks.channels = std::clamp<int64_t>(kChunk / s.inner, 1, s.c);
      chunks.count = s.n * chunks.per_plane;
    }
    return chunks;
  }
  int64_t blocks(const Shape& s) const { return ceil_div(s.c, channels); }  // of channels
  int64_t sums(const Piece& piece) const { return per_plane ? piece.channels * width : width; }
  Piece piece(const Shape& s, int64_t chunk, int64_t block) const {
    if (!per_plane) return {chunk * size, std::min(size, s.n * s.c - chunk * size), 1, 0, s.c, chunk};
    const int64_t image = chunk / per_plane * images, begin = chunk % per_plane * size, channel = block * channels;
    return {.offset = (image * s.c + channel) * s.inner + begin,
            .count = std::min(size, s.inner - begin),
            .images = std::min(images, s.n - image),
            .channel = channel,
            .channels = std::min(channels, s.c - channel),
            .chunk = chunk};
  }
  int64_t values(const Shape& s, int64_t chunk) const {  // per channel
    const Piece all = piece(s, chunk, 0);
    return per_plane ? all.images * all.count : all.count / s.c;
  }
};

// f(offset, count, k, of) for each span of a piece, in NCHW that of its k-th channel. `of(constants)` is what the loops read.
template <class F>
void for_spans(const Shape& s, const Piece& piece, const F& f) {
  if (s.inner == 1) return f(piece.offset, piece.count, 0, [](const auto* constants) { return constants; });
  for (int64_t image = 0; image < piece.images; ++image) {
    for (int64_t k = 0; k < piece.channels; ++k) {
      f(piece.offset + (image * s.c + k) * s.inner, piece.count, k,
        [&](const auto* constants) { return Same{constants[piece.channel + k]}; });
    }
  }
}

// out[k] = median of a[k * stride], b[..], c[..]
template <typename scalar_t>
EF_CPU_CLONES void medians(const scalar_t* a, const scalar_t* b, const scalar_t* c, int64_t count, int64_t stride,
                           acc_t<scalar_t>* __restrict out) {
  using A = acc_t<scalar_t>;
  for (int64_t k = 0; k < count; ++k) out[k] = median(A(a[k * stride]), A(b[k * stride]), A(c[k * stride]));
}

// An exponential is a long chain of dependent operations: two vectors' chains side by side keep the units busy.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC optimize("schedule-insns", "unroll-loops")
#endif
template <typename scalar_t, class Of>
EF_CPU_CLONES void add_moments(const scalar_t* __restrict x, int64_t count, int64_t width, Of pivot, acc_t<scalar_t>* __restrict sum,
                               acc_t<scalar_t>* __restrict squares) {
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

template <Activation kActivation, typename scalar_t, class Of>
EF_CPU_CLONES void normalize(const scalar_t* __restrict x, int64_t count, int64_t width, Of mean, Of scale, Of bias,
                             scalar_t* __restrict y) {
  using A = acc_t<scalar_t>;
  for (int64_t i = 0; i < count; i += width) {
    const int64_t lanes = std::min(width, count - i);
#pragma omp simd
    for (int64_t j = 0; j < lanes; ++j) y[i + j] = scalar_t(value<kActivation>(A(x[i + j]), mean[j], scale[j], bias[j]));
  }
}

template <Activation kActivation, bool kKeep, typename scalar_t, class Of>
EF_CPU_CLONES void add_gradients(const scalar_t* __restrict grad, const scalar_t* __restrict x, int64_t count, int64_t width, Of mean,
                                 Of scale, Of bias, acc_t<scalar_t>* __restrict sum, acc_t<scalar_t>* __restrict products,
                                 scalar_t* __restrict kept) {
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

template <Activation kActivation, typename scalar_t, class Of>
EF_CPU_CLONES void input_gradients(const scalar_t* grad, const scalar_t* __restrict x, int64_t count, int64_t width, Of mean, Of scale,
                                   Of bias, Of shift, Of slope, scalar_t* grad_x) {  // may be grad
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

// rows[i, lane] = values(channel of the lane)[i], for some channels of c.
template <typename A, class F>
void fill_lanes(A* rows, int64_t lanes, int64_t c, int64_t begin, int64_t end, const F& values) {
  for (int64_t channel = begin; channel < end; ++channel) {
    A* row = rows;
    for (const A value : values(channel)) {
      for (int64_t lane = channel; lane < lanes; lane += c) row[lane] = value;
      row += lanes;
    }
  }
}
}  // namespace ef::batch_norm_act
