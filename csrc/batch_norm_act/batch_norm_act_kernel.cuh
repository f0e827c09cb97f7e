// Batch normalization with activation over dense [n, c, inner]; formulas in batch_norm_act_math.h.
// A thread walks one strided row of 16-byte vectors (kVec = 1 where channels or addresses do not allow it) and never leaves its
// channels, whose constants it computes once:
//   channels_last (kPixels): kVec channels of every `rows`-th pixel of a chunk; a block is `columns` such threads side by side times
//     `rows` below each other, which reads whole stretches of memory. The chunk's sums are added over the rows through shared memory.
//   NCHW: one channel; a warp owns a piece of a plane and adds up within itself, no shared memory.
// Bytes per element of size s: forward 3 s (statistics read x, then x is read again and y written), backward 5 s; with constant
// statistics 2 s and 3 s, or 5 s where weight or bias want a gradient. Reading twice is the fewest possible: nothing but the whole
// batch gives a mean.
// Sums are float per thread, then per block or warp in a fixed order, then double over the chunks by one block per few channels.
#pragma once
#include "../common/row_sums.cuh"
#include "../common/vector_walk.cuh"
#include "batch_norm_act.h"

namespace ef::batch_norm_act {
inline constexpr int kThreads = 256;
inline constexpr int kFinishChannels = 8, kFinishRows = 32;
inline constexpr int64_t kPiece = 8192;  // of a plane

struct Layout {
  int64_t columns, rows;  // of a block, kPixels only
  int64_t size;           // pixels of a chunk, or elements of a piece
  int64_t pieces;         // of a plane
  int64_t chunks;         // all that have partials: of the pixels, or images times pieces
  EF_HD int64_t values(const Shape& s, int64_t chunk, bool pixels) const {
    const int64_t whole = pixels ? s.n : s.inner, first = (pixels ? chunk : chunk % pieces) * size;
    return whole - first < size ? whole - first : size;
  }
};

// What a thread does: vectors of channels `channel` on; its sums are part of those of `chunk`.
struct Walk {
  Strided vectors;
  int64_t channel, chunk;
  int row, column;
  bool active;
};
template <bool kPixels, int kVec>
__device__ Walk walk_of(const Shape& s, const Layout& l) {
  Walk w;
  if constexpr (kPixels) {
    w.column = threadIdx.x % int(l.columns);
    w.row = threadIdx.x / int(l.columns);
    w.chunk = blockIdx.x;
    w.channel = (int64_t(blockIdx.y) * l.columns + w.column) * kVec;
    w.active = w.row < l.rows && w.channel < s.c;
    const int64_t begin = w.chunk * l.size;
    w.vectors.first = (begin + w.row) * s.c + w.channel;
    w.vectors.end = (begin + l.values(s, w.chunk, true)) * s.c;
    w.vectors.stride = l.rows * s.c;
  } else {
    const int64_t warp = int64_t(blockIdx.x) * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
    w.column = threadIdx.x % kWarpSize;
    w.row = 0;
    const int64_t piece = warp % l.pieces, plane = warp / l.pieces;
    w.channel = plane % s.c;
    w.chunk = plane / s.c * l.pieces + piece;
    w.active = plane < s.n * s.c;
    const int64_t begin = plane * s.inner + piece * l.size;
    w.vectors.first = begin + w.column * kVec;
    w.vectors.end = begin + l.values(s, w.chunk, false);
    w.vectors.stride = kWarpSize * kVec;
  }
  return w;
}

// What belongs to a thread's channels: kCount neighbors, or the one of NCHW.
template <int kCount, typename A>
struct Channels {
  A mean[kCount], scale[kCount], bias[kCount], inverse[kCount];
  __device__ void load(const Norm<A>& norm, int64_t c) {
    load_neighbors(norm.mean + c, mean);
    load_neighbors(norm.var + c, inverse);
    if (norm.bias) {
      load_neighbors(norm.bias + c, bias);
    } else {
#pragma unroll
      for (int k = 0; k < kCount; ++k) bias[k] = A(0);
    }
    if (norm.weight) load_neighbors(norm.weight + c, scale);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      inverse[k] = inverse_deviation(inverse[k], norm.eps);
      scale[k] = norm.weight ? scale[k] * inverse[k] : inverse[k];
    }
  }
};
// And the gradients': grad_x = scale g + shift + slope (x - mean), from the sums [2, c] times `factor`; null where mean and var are
// constants.
template <int kCount, typename A>
struct GradChannels : Channels<kCount, A> {
  A shift[kCount], slope[kCount];
  __device__ void load(const Norm<A>& norm, const A* sums, A factor, int64_t channels, int64_t c) {
    if (sums) {
      load_neighbors(sums + c, shift);
      load_neighbors(sums + channels + c, slope);
    }
    Channels<kCount, A>::load(norm, c);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const GradChannel<A> of_sums = grad_channel_of(this->scale[k], this->inverse[k], shift[k], slope[k], factor);
      shift[k] = sums ? of_sums.shift : A(0);
      slope[k] = sums ? of_sums.slope : A(0);
    }
  }
};

// Adds two sums per channel over the threads that share it and stores them as rows first_row and first_row + 1 of the chunk's partials.
template <bool kPixels, int kVec, typename A>
__device__ void store_sums(const Shape& s, const Layout& l, const Walk& w, const A (&sums)[2][kVec], int first_row, A* partials) {
  A* out = partials + (w.chunk * 3 + first_row) * s.c;
  if constexpr (kPixels) {
    const int64_t first = int64_t(blockIdx.y) * l.columns * kVec;
    sum_over_rows(sums, w.row, w.column, int(l.rows), int(l.columns), [&](int channel, const A(&totals)[2]) {
      if (first + channel >= s.c) return;
      out[first + channel] = totals[0];
      out[s.c + first + channel] = totals[1];
    });
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      A total = 0;
#pragma unroll
      for (int k = 0; k < kVec; ++k) total += sums[i][k];
      total = warp_sum(total);
      if (w.active && w.column == 0) out[i * s.c + w.channel] = total;
    }
  }
}

// Rows of the partials: pivot, sum and sum of squares of the distances to it.
template <bool kPixels, int kVec, typename scalar_t>
__global__ void batch_norm_stats_kernel(Shape s, Layout l, const scalar_t* __restrict__ x,  // [n, c, inner]
                                        acc_t<scalar_t>* __restrict__ partials) {           // [l.chunks, 3, c]
  using A = acc_t<scalar_t>;
  const Walk w = walk_of<kPixels, kVec>(s, l);
  constexpr int kChannels = kPixels ? kVec : 1;
  A pivot[kChannels] = {}, sums[2][kVec] = {};
  if (w.active) {
    for_each_vector<kVec>(
        w.vectors, {x},
        [&] {
          const scalar_t* begin = x + w.vectors.first - (kPixels ? w.row * s.c : w.column * int64_t(kVec));
          const int64_t step = kPixels ? s.c : 1, last = l.values(s, w.chunk, kPixels) - 1;
          A first[kChannels], middle[kChannels], end[kChannels];
          load_neighbors(begin, first);
          load_neighbors(begin + last / 2 * step, middle);
          load_neighbors(begin + last * step, end);
#pragma unroll
          for (int k = 0; k < kChannels; ++k) pivot[k] = median(first[k], middle[k], end[k]);
        },
        [&](int64_t, const Packed<scalar_t, kVec>(&in)[1]) {
          A values[kVec];
          unpack(in[0], values);
#pragma unroll
          for (int k = 0; k < kVec; ++k) {
            const A d = values[k] - pivot[kPixels ? k : 0];
            sums[0][k] += d;
            sums[1][k] += d * d;
          }
        });
    if (w.row == 0 && (kPixels || w.column == 0)) {
#pragma unroll
      for (int k = 0; k < kChannels; ++k) partials[w.chunk * 3 * s.c + w.channel + k] = pivot[k];
    }
  }
  store_sums<kPixels>(s, l, w, sums, 1, partials);
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
__global__ void batch_norm_finish_stats_kernel(Shape s, Layout l, const A* __restrict__ partials,  // [l.chunks, 3, c]
                                               Statistics<A> statistics) {
  const int64_t channel = int64_t(blockIdx.x) * kFinishChannels + threadIdx.x;
  const A* of_channel = partials + (channel < s.c ? channel : 0);
  double total = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.y; i < l.chunks; i += kFinishRows) {
    const A* p = of_channel + i * 3 * s.c;
    total += double(l.values(s, i, kPixels)) * double(p[0]) + double(p[s.c]);
  }
  const double overall = total_of_channel(total, shared_memory<double>()) / double(s.values());
  double squares = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.y; i < l.chunks; i += kFinishRows) {
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
  Channels<kPixels ? kVec : 1, A> channels;
  for_each_vector<kVec>(
      w.vectors, {x}, [&] { channels.load(norm, w.channel); },
      [&](int64_t i, const Packed<scalar_t, kVec>(&in)[1]) {
        A values[kVec];
        unpack(in[0], values);
        Vec<scalar_t, kVec> out;
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
          const int c = kPixels ? k : 0;
          out.v[k] = scalar_t(value<kActivation>(values[k], channels.mean[c], channels.scale[c], channels.bias[c]));
        }
        store_vec<kVec>(y + i, out);
      });
}

// Rows of the partials: sum of g, and of g times the distance to the mean.
template <bool kPixels, int kVec, Activation kActivation, typename scalar_t>
__global__ void batch_norm_act_sums_kernel(Shape s, Layout l, Norm<acc_t<scalar_t>> norm,
                                           const scalar_t* __restrict__ grad,         // [n, c, inner]
                                           const scalar_t* __restrict__ x,            // [n, c, inner]
                                           acc_t<scalar_t>* __restrict__ partials) {  // [l.chunks, 3, c]
  using A = acc_t<scalar_t>;
  const Walk w = walk_of<kPixels, kVec>(s, l);
  A sums[2][kVec] = {};
  if (w.active) {
    Channels<kPixels ? kVec : 1, A> channels;
    for_each_vector<kVec>(
        w.vectors, {x, grad}, [&] { channels.load(norm, w.channel); },
        [&](int64_t, const Packed<scalar_t, kVec>(&in)[2]) {
          A values[kVec], upstream[kVec];
          unpack(in[0], values);
          unpack(in[1], upstream);
#pragma unroll
          for (int k = 0; k < kVec; ++k) {
            const int c = kPixels ? k : 0;
            const A distance = values[k] - channels.mean[c];
            const A g = grad_normalized<kActivation>(upstream[k], distance, channels.scale[c], channels.bias[c]);
            sums[0][k] += g;
            sums[1][k] += g * distance;
          }
        });
  }
  store_sums<kPixels>(s, l, w, sums, 0, partials);
}

template <typename A>
__global__ void batch_norm_finish_sums_kernel(Shape s, Layout l, Norm<A> norm, const A* __restrict__ partials,  // [l.chunks, 3, c]
                                              A* __restrict__ sums) {                                           // [2, c]
  const int64_t channel = int64_t(blockIdx.x) * kFinishChannels + threadIdx.x;
  const A* of_channel = partials + (channel < s.c ? channel : 0);
  double sum = 0, products = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.y; i < l.chunks; i += kFinishRows) {
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
  GradChannels<kPixels ? kVec : 1, A> channels;
  for_each_vector<kVec>(
      w.vectors, {x, grad}, [&] { channels.load(norm, sums, factor, s.c, w.channel); },
      [&](int64_t i, const Packed<scalar_t, kVec>(&in)[2]) {
        A values[kVec], upstream[kVec];
        unpack(in[0], values);
        unpack(in[1], upstream);
        Vec<scalar_t, kVec> out;
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
          const int c = kPixels ? k : 0;
          const A distance = values[k] - channels.mean[c];
          const A g = grad_normalized<kActivation>(upstream[k], distance, channels.scale[c], channels.bias[c]);
          out.v[k] = scalar_t(channels.scale[c] * g + (channels.shift[c] + channels.slope[c] * distance));
        }
        store_vec<kVec>(grad_x + i, out);
      });
}
}  // namespace ef::batch_norm_act
