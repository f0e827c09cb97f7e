// Batch normalization with activation over dense [n, c, inner]; formulas in batch_norm_act_math.h.
// A thread walks one strided row of 16-byte vectors (kVec = 1 where channels or addresses do not allow it) and never leaves its
// channels, whose constants it computes once:
//   channels_last (kPixels): kVec channels of every `rows`-th pixel of a slab; a block is `columns` such threads side by side times
//     `rows` below each other, which reads whole stretches of memory. The slab's sums are added over the rows through shared memory.
//   NCHW: one channel; a warp owns a piece of a plane and adds up within itself, no shared memory.
// Bytes per element of size s: forward 3 s (statistics read x, then x is read again and y written), backward 5 s; with constant
// statistics 2 s and 3 s, or 5 s where weight or bias want a gradient. Reading twice is the fewest possible: nothing but the whole
// batch gives a mean.
// Sums are float per thread, then per block or warp in a fixed order, then double over the parts by one block per few channels.
#pragma once
#include "../common/launch.cuh"
#include "../common/vec.cuh"
#include "batch_norm_act.h"

namespace ef::batch_norm_act {
inline constexpr int kThreads = 256;
inline constexpr int kFinishChannels = 8, kFinishRows = 32;
inline constexpr int64_t kPiece = 8192;  // of a plane

struct Layout {
  int64_t columns, rows;  // of a block, kPixels only
  int64_t size;           // pixels of a slab, or elements of a piece
  int64_t pieces;         // of a plane
  int64_t parts;          // all that have partials: slabs, or images times pieces
  EF_HD int64_t values(const Shape& s, int64_t part, bool pixels) const {
    const int64_t whole = pixels ? s.n : s.inner, first = (pixels ? part : part % pieces) * size;
    return whole - first < size ? whole - first : size;
  }
};

// What a thread does: elements first, first + stride, ... below end, of channels `channel` on; part of the sums of `part`.
struct Walk {
  int64_t first, end, stride, channel, part;
  int row, column;
  bool active;
};
template <bool kPixels, int kVec>
__device__ Walk walk_of(const Shape& s, const Layout& l) {
  Walk w;
  if constexpr (kPixels) {
    w.column = threadIdx.x % int(l.columns);
    w.row = threadIdx.x / int(l.columns);
    w.part = blockIdx.x;
    w.channel = (int64_t(blockIdx.y) * l.columns + w.column) * kVec;
    w.active = w.row < l.rows && w.channel < s.c;
    const int64_t begin = w.part * l.size;
    w.first = (begin + w.row) * s.c + w.channel;
    w.end = (begin + l.values(s, w.part, true)) * s.c;
    w.stride = l.rows * s.c;
  } else {
    const int64_t warp = int64_t(blockIdx.x) * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
    w.column = threadIdx.x % kWarpSize;
    w.row = 0;
    const int64_t piece = warp % l.pieces, plane = warp / l.pieces;
    w.channel = plane % s.c;
    w.part = plane / s.c * l.pieces + piece;
    w.active = plane < s.n * s.c;
    const int64_t begin = plane * s.inner + piece * l.size;
    w.first = begin + w.column * kVec;
    w.end = begin + l.values(s, w.part, false);
    w.stride = kWarpSize * kVec;
  }
  return w;
}

// The channel of element k of a thread's vectors.
template <bool kPixels>
EF_HD int64_t channel_of(const Walk& w, int k) {
  return kPixels ? w.channel + k : w.channel;
}

// Adds two sums per channel over the threads that share it and stores them as rows first_row and first_row + 1 of the part's partials.
template <bool kPixels, int kVec, typename A>
__device__ void store_sums(const Shape& s, const Layout& l, const Walk& w, const A (&a)[kVec], const A (&b)[kVec], int first_row,
                           A* partials) {
  A* out = partials + w.part * 3 * s.c;
  if constexpr (kPixels) {
    const int width = int(l.columns) * kVec, rows = int(l.rows);
    A *shared_a = shared_memory<A>(), *shared_b = shared_a + rows * width;
    if (w.row < rows) {
#pragma unroll
      for (int k = 0; k < kVec; ++k) {
        shared_a[w.row * width + w.column * kVec + k] = a[k];
        shared_b[w.row * width + w.column * kVec + k] = b[k];
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < width; i += kThreads) {
      const int64_t channel = int64_t(blockIdx.y) * width + i;
      if (channel >= s.c) continue;
      A total_a = 0, total_b = 0;
      for (int row = 0; row < rows; ++row) {
        total_a += shared_a[row * width + i];
        total_b += shared_b[row * width + i];
      }
      out[first_row * s.c + channel] = total_a;
      out[(first_row + 1) * s.c + channel] = total_b;
    }
  } else {
    A total_a = 0, total_b = 0;
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      total_a += a[k];
      total_b += b[k];
    }
    total_a = warp_sum(total_a);
    total_b = warp_sum(total_b);
    if (w.active && w.column == 0) {
      out[first_row * s.c + w.channel] = total_a;
      out[(first_row + 1) * s.c + w.channel] = total_b;
    }
  }
}

// Rows of the partials: pivot, sum and sum of squares of the distances to it.
template <bool kPixels, int kVec, typename scalar_t>
__global__ void batch_norm_stats_kernel(Shape s, Layout l, const scalar_t* __restrict__ x,  // [n, c, inner]
                                        acc_t<scalar_t>* __restrict__ partials) {           // [l.parts, 3, c]
  using A = acc_t<scalar_t>;
  const Walk w = walk_of<kPixels, kVec>(s, l);
  A pivot[kVec] = {}, sum[kVec] = {}, squares[kVec] = {};
  if (w.active) {
    const int64_t step = kPixels ? s.c : 1, begin = w.first - (kPixels ? w.row * s.c : w.column * int64_t(kVec));
    const int64_t last = l.values(s, w.part, kPixels) - 1;
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      const scalar_t* p = x + begin + (kPixels ? k : 0);
      pivot[k] = median(A(p[0]), A(p[last / 2 * step]), A(p[last * step]));
    }
#pragma unroll 4
    for (int64_t i = w.first; i < w.end; i += w.stride) {
      const Vec<scalar_t, kVec> value = load_vec<kVec>(x + i);
#pragma unroll
      for (int k = 0; k < kVec; ++k) {
        const A d = A(value.v[k]) - pivot[k];
        sum[k] += d;
        squares[k] += d * d;
      }
    }
    if (w.row == 0 && (kPixels || w.column == 0)) {
#pragma unroll
      for (int k = 0; k < (kPixels ? kVec : 1); ++k) partials[w.part * 3 * s.c + channel_of<kPixels>(w, k)] = pivot[k];
    }
  }
  store_sums<kPixels>(s, l, w, sum, squares, 1, partials);
}

// The sum over the threads of one channel, known to all of them. Scratch: [kFinishRows, kFinishChannels].
__device__ inline double total_of_channel(double mine, double* scratch) {
  __syncthreads();  // the last total may still be being read
  scratch[threadIdx.y * kFinishChannels + threadIdx.x] = mine;
  __syncthreads();
  double total = 0;
  for (int row = 0; row < kFinishRows; ++row) total += scratch[row * kFinishChannels + threadIdx.x];
  return total;
}

template <bool kPixels, typename A>
__global__ void batch_norm_finish_stats_kernel(Shape s, Layout l, const A* __restrict__ partials,  // [l.parts, 3, c]
                                               Statistics<A> statistics) {
  const int64_t channel = int64_t(blockIdx.x) * kFinishChannels + threadIdx.x;
  const A* of_channel = partials + (channel < s.c ? channel : 0);
  double total = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.y; i < l.parts; i += kFinishRows) {
    const A* p = of_channel + i * 3 * s.c;
    total += double(l.values(s, i, kPixels)) * double(p[0]) + double(p[s.c]);
  }
  const double overall = total_of_channel(total, shared_memory<double>()) / double(s.values());
  double squares = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.y; i < l.parts; i += kFinishRows) {
    const A* p = of_channel + i * 3 * s.c;
    squares += squares_about(overall, double(l.values(s, i, kPixels)), double(p[0]), double(p[s.c]), double(p[2 * s.c]));
  }
  squares = total_of_channel(squares, shared_memory<double>());
  if (threadIdx.y == 0 && channel < s.c) {
    statistics.set(channel, A(overall), A(squares < 0 ? 0 : squares / double(s.values())), s.values());
  }
}

template <bool kPixels, int kVec, Activation kActivation, typename scalar_t>
__global__ void batch_norm_act_kernel(Shape s, Layout l, Norm<acc_t<scalar_t>> norm,
                                      const scalar_t* __restrict__ x,  // [n, c, inner]
                                      scalar_t* __restrict__ y) {      // [n, c, inner]
  using A = acc_t<scalar_t>;
  const Walk w = walk_of<kPixels, kVec>(s, l);
  if (!w.active) return;
  constexpr int kChannels = kPixels ? kVec : 1;
  Channel<A> channels[kChannels];
#pragma unroll
  for (int k = 0; k < kChannels; ++k) channels[k] = norm.channel(w.channel + k);
#pragma unroll 4
  for (int64_t i = w.first; i < w.end; i += w.stride) {
    const Vec<scalar_t, kVec> in = load_vec<kVec>(x + i);
    Vec<scalar_t, kVec> out;
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      const Channel<A>& c = channels[kPixels ? k : 0];
      out.v[k] = scalar_t(value<kActivation>(A(in.v[k]), c.mean, c.scale, c.bias));
    }
    store_vec<kVec>(y + i, out);
  }
}

// Rows of the partials: sum of g, and of g times the distance to the mean.
template <bool kPixels, int kVec, Activation kActivation, typename scalar_t>
__global__ void batch_norm_act_sums_kernel(Shape s, Layout l, Norm<acc_t<scalar_t>> norm,
                                           const scalar_t* __restrict__ grad,         // [n, c, inner]
                                           const scalar_t* __restrict__ x,            // [n, c, inner]
                                           acc_t<scalar_t>* __restrict__ partials) {  // [l.parts, 3, c]
  using A = acc_t<scalar_t>;
  const Walk w = walk_of<kPixels, kVec>(s, l);
  constexpr int kChannels = kPixels ? kVec : 1;
  A sum[kVec] = {}, products[kVec] = {};
  if (w.active) {
    Channel<A> channels[kChannels];
#pragma unroll
    for (int k = 0; k < kChannels; ++k) channels[k] = norm.channel(w.channel + k);
#pragma unroll 2
    for (int64_t i = w.first; i < w.end; i += w.stride) {
      const Vec<scalar_t, kVec> in = load_vec<kVec>(x + i), upstream = load_vec<kVec>(grad + i);
#pragma unroll
      for (int k = 0; k < kVec; ++k) {
        const Channel<A>& c = channels[kPixels ? k : 0];
        const A distance = A(in.v[k]) - c.mean, g = grad_normalized<kActivation>(A(upstream.v[k]), distance, c.scale, c.bias);
        sum[k] += g;
        products[k] += g * distance;
      }
    }
  }
  store_sums<kPixels>(s, l, w, sum, products, 0, partials);
}

template <typename A>
__global__ void batch_norm_finish_sums_kernel(Shape s, Layout l, Norm<A> norm, const A* __restrict__ partials,  // [l.parts, 3, c]
                                              A* __restrict__ sums) {                                           // [2, c]
  const int64_t channel = int64_t(blockIdx.x) * kFinishChannels + threadIdx.x;
  const A* of_channel = partials + (channel < s.c ? channel : 0);
  double sum = 0, products = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.y; i < l.parts; i += kFinishRows) {
    sum += double(of_channel[i * 3 * s.c]);
    products += double(of_channel[(i * 3 + 1) * s.c]);
  }
  sum = total_of_channel(sum, shared_memory<double>());
  products = total_of_channel(products, shared_memory<double>());
  if (threadIdx.y == 0 && channel < s.c) {
    sums[channel] = A(sum);
    sums[s.c + channel] = A(products * double(inverse_deviation(norm.var[channel], norm.eps)));
  }
}

template <bool kPixels, int kVec, Activation kActivation, typename scalar_t>
__global__ void batch_norm_act_grad_input_kernel(Shape s, Layout l, Norm<acc_t<scalar_t>> norm,
                                                 const scalar_t* __restrict__ grad,         // [n, c, inner]
                                                 const scalar_t* __restrict__ x,            // [n, c, inner]
                                                 const acc_t<scalar_t>* __restrict__ sums,  // [2, c], or null
                                                 acc_t<scalar_t> factor,
                                                 scalar_t* __restrict__ grad_x) {  // [n, c, inner]
  using A = acc_t<scalar_t>;
  const Walk w = walk_of<kPixels, kVec>(s, l);
  if (!w.active) return;
  constexpr int kChannels = kPixels ? kVec : 1;
  Channel<A> channels[kChannels];
  GradChannel<A> of_sums[kChannels];
#pragma unroll
  for (int k = 0; k < kChannels; ++k) {
    channels[k] = norm.channel(w.channel + k);
    of_sums[k] = norm.grad_channel(sums, factor, s.c, w.channel + k);
  }
#pragma unroll 2
  for (int64_t i = w.first; i < w.end; i += w.stride) {
    const Vec<scalar_t, kVec> in = load_vec<kVec>(x + i), upstream = load_vec<kVec>(grad + i);
    Vec<scalar_t, kVec> out;
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      const Channel<A>& c = channels[kPixels ? k : 0];
      const GradChannel<A>& d = of_sums[kPixels ? k : 0];
      const A distance = A(in.v[k]) - c.mean, g = grad_normalized<kActivation>(A(upstream.v[k]), distance, c.scale, c.bias);
      out.v[k] = scalar_t(c.scale * g + (d.shift + d.slope * distance));
    }
    store_vec<kVec>(grad_x + i, out);
  }
}
}  // namespace ef::batch_norm_act
