// Squeeze-and-excite over dense [rows, pixels, channels]; formulas in squeeze_excite_math.h.
// A thread walks one strided run of 16-byte vectors (kVec = 1 where channels, pixels or addresses do not allow it) and never leaves
// its channels, whose gates it computes once:
//   channels_last (kPixels): kVec channels of every `height`-th pixel of a part of an image; a block is `columns` such threads side by
//     side times `height` below each other, which reads whole stretches of memory. A part is added over them through shared memory.
//   NCHW: one channel; a warp owns a part of a plane and adds up within itself, no shared memory.
// Bytes per element of size s: the means read x, s; the scaling 2 s; backward the sums read x and the gradient, 2 s, and the scaling
// 2 s. Sums are float per thread, then per block or warp in a fixed order, then double over the parts of a row.
#pragma once
#include "../common/launch.cuh"
#include "../common/vec.cuh"
#include "squeeze_excite.h"

namespace ef::squeeze_excite {
inline constexpr int kThreads = 256;
inline constexpr int kFinishRows = 8;

struct Layout {
  int64_t columns, height;  // of a block, kPixels only
  int64_t size, parts;      // pixels of a part, and parts of a row
};

// What a thread does: elements first, first + stride, ... below end, of channels `channel` on; part of the sums of `part`.
struct Walk {
  int64_t first, end, stride, row, channel, part;
  int line, column;
  bool active;
};
template <bool kPixels, int kVec>
__device__ Walk walk_of(const Shape& s, const Layout& l) {
  Walk w;
  if constexpr (kPixels) {
    w.column = threadIdx.x % int(l.columns);
    w.line = threadIdx.x / int(l.columns);
    w.part = blockIdx.x;
    w.channel = (int64_t(blockIdx.y) * l.columns + w.column) * kVec;
    w.active = w.line < l.height && w.channel < s.channels;
    w.stride = l.height * s.channels;
  } else {
    w.column = threadIdx.x % kWarpSize;
    w.line = 0;
    w.part = int64_t(blockIdx.x) * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
    w.channel = 0;
    w.active = w.part < s.rows * l.parts;
    w.stride = kWarpSize * kVec;
  }
  w.row = quotient(w.part, l.parts);
  const int64_t begin = (w.part - w.row * l.parts) * l.size, left = s.pixels - begin;
  w.first = w.row * s.row() + (begin + w.line) * s.channels + (kPixels ? w.channel : int64_t(w.column) * kVec);
  w.end = w.row * s.row() + (begin + (left < l.size ? left : l.size)) * s.channels;
  return w;
}

template <bool kPixels, int kVec, bool kProducts, typename scalar_t>
__global__ void squeeze_excite_reduce_kernel(Shape s, Layout l, const scalar_t* __restrict__ x,  // [rows, pixels, channels]
                                             const scalar_t* __restrict__ grad,                  // [rows, pixels, channels]
                                             acc_t<scalar_t>* __restrict__ partials) {           // [rows, l.parts, channels]
  using A = acc_t<scalar_t>;
  const Walk w = walk_of<kPixels, kVec>(s, l);
  A sum[kVec] = {};
  if (w.active) {
#pragma unroll 4
    for (int64_t i = w.first; i < w.end; i += w.stride) {
      const Vec<scalar_t, kVec> value = load_vec<kVec>(x + i);
      if constexpr (kProducts) {
        const Vec<scalar_t, kVec> factor = load_vec<kVec>(grad + i);
#pragma unroll
        for (int k = 0; k < kVec; ++k) sum[k] += A(value.v[k]) * A(factor.v[k]);
      } else {
#pragma unroll
        for (int k = 0; k < kVec; ++k) sum[k] += A(value.v[k]);
      }
    }
  }
  A* out = partials + w.part * s.channels;
  if constexpr (kPixels) {
    const int width = int(l.columns) * kVec, height = int(l.height);
    A* shared = shared_memory<A>();
    if (w.line < height) {
#pragma unroll
      for (int k = 0; k < kVec; ++k) shared[w.line * width + w.column * kVec + k] = sum[k];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < width; i += kThreads) {
      const int64_t channel = int64_t(blockIdx.y) * width + i;
      if (channel >= s.channels) continue;
      A total = 0;
      for (int line = 0; line < height; ++line) total += shared[line * width + i];
      out[channel] = total;
    }
  } else {
    A total = 0;
#pragma unroll
    for (int k = 0; k < kVec; ++k) total += sum[k];
    total = warp_sum(total);
    if (w.active && w.column == 0) out[0] = total;
  }
}

// A block adds the parts of kWarpSize channels, which kFinishRows threads share.
template <typename A>
__global__ void squeeze_excite_finish_kernel(Shape s, int64_t parts, const A* __restrict__ partials,  // [rows, parts, channels]
                                             const A* __restrict__ gate,                              // [rows, channels], or null
                                             A* __restrict__ result) {                                // [rows, channels]
  const int64_t index = int64_t(blockIdx.x) * kWarpSize + threadIdx.x;
  const bool active = index < s.gates();
  double total = 0;
  if (active) {
    const int64_t row = quotient(index, s.channels);
    const A* of_channel = partials + row * parts * s.channels + (index - row * s.channels);
#pragma unroll 4
    for (int64_t i = threadIdx.y; i < parts; i += kFinishRows) total += double(of_channel[i * s.channels]);
  }
  double* shared = shared_memory<double>();
  shared[threadIdx.y * kWarpSize + threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y != 0 || !active) return;
  for (int line = 1; line < kFinishRows; ++line) total += shared[line * kWarpSize + threadIdx.x];
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
  const int64_t first_gate = w.row * s.channels + w.channel;
  A scale[kChannels], shift[kChannels];
#pragma unroll
  for (int k = 0; k < kChannels; ++k) {
    scale[k] = sigmoid(gate[first_gate + k]);
    shift[k] = kShift ? grad_mean[first_gate + k] * factor : A(0);
  }
#pragma unroll 4
  for (int64_t i = w.first; i < w.end; i += w.stride) {
    const Vec<scalar_t, kVec> in = load_vec<kVec>(x + i);
    Vec<scalar_t, kVec> out;
#pragma unroll
    for (int k = 0; k < kVec; ++k) out.v[k] = scalar_t(scaled<kShift>(A(in.v[k]), scale[kPixels ? k : 0], shift[kPixels ? k : 0]));
    store_vec<kVec>(y + i, out);
  }
}
}  // namespace ef::squeeze_excite
