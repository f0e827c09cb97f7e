// Squeeze-and-excite over dense [rows, pixels, channels]; formulas in squeeze_excite_math.h.
// A thread walks over strided 16-byte vectors (kVec = 1 where channels, pixels or addresses do not allow it) and never leaves
// its channels, whose gates it computes once:
//   channels_last (kPixels): kVec channels of every `height`-th pixel of a chunk of an image; a block is `columns` such threads side by
//     side times `height` below each other, which reads whole stretches of memory. A chunk is added over them through shared memory.
//   NCHW: one channel; a warp owns a chunk of a plane and adds up within itself, no shared memory.
// Bytes per element of size s: the means read x, s; the scaling 2 s; backward the sums read x and the gradient, 2 s, and the scaling
// 2 s. Sums are float per thread, then per block or warp in a fixed order, then double over the chunks of a row.
#pragma once
#include "../common/row_sums.cuh"
#include "../common/vector_walk.cuh"
#include "squeeze_excite.h"

namespace ef::squeeze_excite {
inline constexpr int kThreads = 256;
inline constexpr int kFinishRows = 8;

struct Layout {
  int64_t columns, height;  // of a block, kPixels only
  int64_t size, chunks;     // pixels of a chunk, and chunks of a row
};

// What a thread does: vectors of channels `channel` on of a row of the tensor; its sums are part of those of `chunk`. Its place in the
// block: `block_row`, `column`.
struct Walk {
  Strided vectors;
  int64_t row, channel, chunk;
  int block_row, column;
  bool active;
};
template <bool kPixels, int kVec>
__device__ Walk walk_of(const Shape& s, const Layout& l) {
  Walk w;
  if constexpr (kPixels) {
    w.column = threadIdx.x % int(l.columns);
    w.block_row = threadIdx.x / int(l.columns);
    w.chunk = blockIdx.x;
    w.channel = (int64_t(blockIdx.y) * l.columns + w.column) * kVec;
    w.active = w.block_row < l.height && w.channel < s.channels;
    w.vectors.stride = l.height * s.channels;
  } else {
    w.column = threadIdx.x % kWarpSize;
    w.block_row = 0;
    w.chunk = int64_t(blockIdx.x) * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
    w.channel = 0;
    w.active = w.chunk < s.rows * l.chunks;
    w.vectors.stride = kWarpSize * kVec;
  }
  w.row = quotient(w.chunk, l.chunks);
  const int64_t begin = (w.chunk - w.row * l.chunks) * l.size, left = s.pixels - begin;
  w.vectors.first = w.row * s.row() + (begin + w.block_row) * s.channels + (kPixels ? w.channel : int64_t(w.column) * kVec);
  w.vectors.end = w.row * s.row() + (begin + (left < l.size ? left : l.size)) * s.channels;
  return w;
}

template <bool kPixels, int kVec, bool kProducts, typename scalar_t>
__global__ void squeeze_excite_reduce_kernel(Shape s, Layout l, const scalar_t* __restrict__ x,  // [rows, pixels, channels]
                                             const scalar_t* __restrict__ grad,                  // [rows, pixels, channels]
                                             acc_t<scalar_t>* __restrict__ partials) {           // [rows, l.chunks, channels]
  using A = acc_t<scalar_t>;
  const Walk w = walk_of<kPixels, kVec>(s, l);
  A sum[1][kVec] = {};
  if (w.active) {
    const auto nothing = [] {};
    if constexpr (kProducts) {
      for_each_vector<kVec>(w.vectors, {x, grad}, nothing, [&](int64_t, const Packed<scalar_t, kVec>(&in)[2]) {
        A values[kVec], factors[kVec];
        unpack(in[0], values);
        unpack(in[1], factors);
#pragma unroll
        for (int k = 0; k < kVec; ++k) sum[0][k] += values[k] * factors[k];
      });
    } else {
      for_each_vector<kVec>(w.vectors, {x}, nothing, [&](int64_t, const Packed<scalar_t, kVec>(&in)[1]) {
        A values[kVec];
        unpack(in[0], values);
#pragma unroll
        for (int k = 0; k < kVec; ++k) sum[0][k] += values[k];
      });
    }
  }
  A* out = partials + w.chunk * s.channels;
  if constexpr (kPixels) {
    const int64_t first = int64_t(blockIdx.y) * l.columns * kVec;
    sum_over_rows(sum, w.block_row, w.column, int(l.height), int(l.columns), [&](int channel, const A(&total)[1]) {
      if (first + channel < s.channels) out[first + channel] = total[0];
    });
  } else {
    A total = 0;
#pragma unroll
    for (int k = 0; k < kVec; ++k) total += sum[0][k];
    total = warp_sum(total);
    if (w.active && w.column == 0) out[0] = total;
  }
}

// A block adds the chunks of kWarpSize channels, which kFinishRows threads share.
template <typename A>
__global__ void squeeze_excite_finish_kernel(Shape s, int64_t chunks, const A* __restrict__ partials,  // [rows, chunks, channels]
                                             const A* __restrict__ gate,                               // [rows, channels], or null
                                             A* __restrict__ result) {                                 // [rows, channels]
  const int64_t index = int64_t(blockIdx.x) * kWarpSize + threadIdx.x;
  const bool active = index < s.gates();
  double total = 0;
  if (active) {
    const int64_t row = quotient(index, s.channels);
    const A* of_channel = partials + row * chunks * s.channels + (index - row * s.channels);
#pragma unroll 4
    for (int64_t i = threadIdx.y; i < chunks; i += kFinishRows) total += double(of_channel[i * s.channels]);
  }
  double* shared = shared_memory<double>();
  shared[threadIdx.y * kWarpSize + threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y != 0 || !active) return;
  for (int row = 1; row < kFinishRows; ++row) total += shared[row * kWarpSize + threadIdx.x];
  result[index] = gate ? grad_gate(A(total), gate[index]) : A(total / double(s.pixels));
}

template <bool kPixels, int kVec, bool kShift, typename scalar_t>
__global__ void squeeze_excite_scale_kernel(Shape s, Layout l, const scalar_t* __restrict__ x,   // [rows, pixels, channels]
                                            const acc_t<scalar_t>* __restrict__ gate,            // [rows, channels]
                                            const acc_t<scalar_t>* __restrict__ grad_mean,       // [rows, channels]
                                            acc_t<scalar_t> factor, scalar_t* __restrict__ y) {  // [rows, pixels, channels]
  using A = acc_t<scalar_t>;
  const Walk w = walk_of<kPixels, kVec>(s, l);
  if (!w.active) return;
  constexpr int kChannels = kPixels ? kVec : 1;
  A scale[kChannels], shift[kChannels];
  for_each_vector<kVec>(
      w.vectors, {x},
      [&] {
        const int64_t first_gate = w.row * s.channels + w.channel;
        load_neighbors(gate + first_gate, scale);
        if constexpr (kShift) load_neighbors(grad_mean + first_gate, shift);
#pragma unroll
        for (int k = 0; k < kChannels; ++k) {
          scale[k] = sigmoid(scale[k]);
          shift[k] = kShift ? shift[k] * factor : A(0);
        }
      },
      [&](int64_t i, const Packed<scalar_t, kVec>(&in)[1]) {
        A values[kVec];
        unpack(in[0], values);
        Vec<scalar_t, kVec> out;
#pragma unroll
        for (int k = 0; k < kVec; ++k) out.v[k] = scalar_t(scaled<kShift>(values[k], scale[kPixels ? k : 0], shift[kPixels ? k : 0]));
        store_vec<kVec>(y + i, out);
      });
}
}  // namespace ef::squeeze_excite
