// Gradient of the filter of a depthwise convolution, and of its bias, for maps in either layout; `a` = prologue(x), 0 outside.
//   grad weight[ky, kx] = sum over n, oy, ox of grad[oy, ox] a[oy s - top + ky, ox s - left + kx]
// The outputs are cut into tiles: kColumns columns (or one, for those left over) x some rows of one image. A thread owns kVec channels of
// a tile and marches down its rows with the last rows of grad in registers: each row of x is loaded, and its prologue
// computed, once, and meets every row of grad that it reaches. The k^2 + 1 sums of a channel stay in registers over all of the thread's
// tiles; those of a block's threads are added in a fixed order, and the last block adds those of all chunks, in a fixed order too.
// Bytes per element of size e: 2 e, and the partials.
#pragma once
#include "../common/last_block.cuh"
#include "../common/launch.cuh"
#include "depthwise_conv_kernel.cuh"

namespace ef::depthwise_conv {
// As few registers as hold the sums and the rows of grad without a spill: 255, 168 or 128.
template <int kKernel, int kStride, typename scalar_t>
inline constexpr int kMinWeightBlocks = sizeof(scalar_t) == 8 || kKernel == 5 ? 2
                                        : kStride == 2                        ? 3
                                                                              : 4;

// How the outputs of a map are cut into tiles, in the order (image, rows, columns).
struct Tiling {
  int64_t groups, across, down, count;  // groups of kColumns columns; tiles side by side, and below each other in an image; all
};
EF_HD Tiling tiling_of(const Shape& s, int columns, int64_t tile_rows) {
  const int64_t groups = s.ow / columns, across = groups + s.ow % columns, down = ceil_div(s.oh, tile_rows);
  return {groups, across, down, s.n * down * across};
}

// Adds a tile of `rows` rows of grad. grad and x point to its first output and the first input that it reaches, which lies in row iy of
// the image and may be outside. Step m loads row m of grad and the input rows m s, ..., m s + s - 1, which meet the rows m - a of grad
// through the taps ky = u + a s. Row m of grad stays in the registers m % (kDepth + 1), which the loop's unrolling makes constants.
// In all steps but the first and last few every row is there: nothing else is asked in them, but in float64, for which only gradient
// checks ask.
template <int kKernel, int kStride, int kColumns, int kVec, bool kWide, typename scalar_t, typename A>
__device__ void add_tile(const Shape& s, Activation prologue, const Strides& in, const Strides& out, const scalar_t* grad,
                         const scalar_t* x, int rows, int64_t iy, int64_t ix, int with_bias, A (&sum)[kKernel * kKernel + 1][kVec]) {
  constexpr int kDepth = (kKernel - 1) / kStride, kRows = kDepth + 1, kLoaded = (kColumns - 1) * kStride + kKernel;
  const unsigned valid = inside<kLoaded>(ix, s.w), all = (1u << kColumns) - 1;
  const auto is_inside = [&](int64_t y) { return y >= 0 && y < s.h; };
  int first_full = kDepth, end_full = rows;
  while (first_full < rows && !is_inside(iy + first_full * kStride)) ++first_full;
  while (end_full > first_full && !is_inside(iy + end_full * kStride - 1)) --end_full;
  const unsigned full_steps = end_full > first_full ? end_full - first_full : 0;
  // Others leave no registers for it; 3x3 has warps enough to hide the wait.
  constexpr bool kAhead = sizeof(scalar_t) == 2 && (kVec == 1 || kKernel == 5 || kStride == 2);
  Rows<0, kWide ? kColumns : 1, kColumns, kVec, true, kAhead, scalar_t> outputs(grad, {0, unsigned(rows)}, out.row, all, out.column);
  Rows<kKernel / 2, kWide ? kColumns : 1, kLoaded, kVec, true, kAhead, scalar_t> inputs(x, rows_inside(iy, (rows + kDepth) * kStride, s.h),
                                                                                        in.row, valid, in.column);
  constexpr bool kFullSteps = sizeof(scalar_t) < 8;
  A g[kRows][kColumns][kVec];
  for (int first = 0; first < rows + kDepth; first += kRows) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int m = first + i;
      const auto step = [&]<bool kFull>() {
        if (outputs.template next<kFull>(g[i]) && with_bias) {
#pragma unroll
          for (int j = 0; j < kColumns * kVec; ++j) sum[kKernel * kKernel][j % kVec] += g[i][j / kVec][j % kVec];
        }
#pragma unroll
        for (int u = 0; u < kStride; ++u) {
          A values[kLoaded][kVec];
          if (!inputs.template next<kFull>(values)) continue;
          activate_all(prologue, values);
#pragma unroll
          for (int a = 0; u + a * kStride < kKernel; ++a) {
            if (!kFull && (m < a || m - a >= rows)) continue;  // x may be infinite there: zero times it would not be zero
#pragma unroll
            for (int kx = 0; kx < kKernel; ++kx) {
#pragma unroll
              for (int j = 0; j < kColumns; ++j) {
#pragma unroll
                for (int v = 0; v < kVec; ++v) {
                  sum[(u + a * kStride) * kKernel + kx][v] += g[(i - a + kRows) % kRows][j][v] * values[j * kStride + kx][v];
                }
              }
            }
          }
        }
      };
      if (kFullSteps && unsigned(m - first_full) < full_steps) [[likely]] {
        step.template operator()<true>();
      } else {
        if (m >= rows + kDepth) break;
        step.template operator()<false>();
      }
    }
  }
}

// Adds the partials of these chunks, in order; each block in x has those of `block_channels` channels. For all threads of a block. Those
// that are loaded together are one term of the sum, as short chains of additions round less.
template <int kTaps, int kVec, typename A, typename scalar_t>
__device__ void add_partials(const Chunks& chunks, int64_t channels, int block_channels, A* partials,
                             const ParameterGradient<scalar_t>& grad_weight, const ParameterGradient<scalar_t>& grad_bias) {
  const int64_t begin = int64_t(chunks.begin_x) * block_channels, end = min(int64_t(chunks.end_x) * block_channels, channels);
  const int64_t step = chunks.stride * (kTaps + 1) * channels;
  const unsigned width = unsigned(end - begin) / kVec;
  for (unsigned i = threadIdx.y * blockDim.x + threadIdx.x; i < (kTaps + 1) * width; i += blockDim.x * blockDim.y) {
    const unsigned t = i / width;
    const int64_t c = begin + i % width * kVec;
    A* const first_partial = partials + (int64_t(chunks.first) * (kTaps + 1) + t) * channels + c;
    A sum[kVec] = {};
    for (unsigned first = 0; first < chunks.count; first += kFan) {
      Vec<A, kVec> loaded[kFan];
#pragma unroll
      for (unsigned k = 0; k < kFan; ++k) {
        if (first + k < chunks.count) loaded[k] = load_partial<kVec>(first_partial + (first + k) * step);
      }
      A term[kVec] = {};
#pragma unroll
      for (unsigned k = 0; k < kFan * kVec; ++k) {
        if (first + k / kVec < chunks.count) term[k % kVec] += loaded[k / kVec].v[k % kVec];
      }
#pragma unroll
      for (int v = 0; v < kVec; ++v) sum[v] += term[v];
    }
    if (!chunks.are_all) {
      store_partial(first_partial, sum);
      continue;
    }
#pragma unroll
    for (int v = 0; v < kVec; ++v) {
      if (t < kTaps) {
        grad_weight.set((c + v) * kTaps + t, sum[v]);
      } else if (grad_bias.data) {
        grad_bias.set(c + v, sum[v]);
      }
    }
  }
}

// blockDim.x channel groups x blockDim.y shares of the chunk's tiles. Where a thread has one channel, as in nchw, the lanes of a warp share
// it: blockDim.x = 1, and shares are added over the warp first.
template <int kKernel, int kStride, int kColumns, int kVec, bool kWide, typename scalar_t>
__global__ void __launch_bounds__(kThreads, kMinWeightBlocks<kKernel, kStride, scalar_t>)
    depthwise_conv_grad_weight_kernel(const TiledLevels<scalar_t> levels, int with_bias, const Finish finish,
                                      acc_t<scalar_t>* __restrict__ partials,         // [gridDim.y][k * k + 1][c]
                                      const ParameterGradient<scalar_t> grad_weight,  // [c][k * k]
                                      const ParameterGradient<scalar_t> grad_bias) {  // [c], or null
  using A = acc_t<scalar_t>;
  constexpr int kTaps = kKernel * kKernel;
  constexpr bool kLanesShare = kVec == 1;
  const TiledLevel<scalar_t>& of = level_of(levels, blockIdx.y);
  const Shape& s = of.level.shape;
  const Strides in = of.in.kept(), out = of.out.kept();
  const int64_t first_channel = int64_t(blockIdx.x) * blockDim.x * kVec, c = first_channel + threadIdx.x * kVec;
  const Tiling tiling = tiling_of(s, kColumns, of.tile_rows);
  const int64_t first_tile = (blockIdx.y - of.first_block) * of.chunk_tiles, end = first_tile + of.chunk_tiles;
  const int64_t last_tile = end < tiling.count ? end : tiling.count;
  const Activation prologue = levels.level[0].level.shape.prologue;  // of all; at a constant address
  A sum[kTaps + 1][kVec];
#pragma unroll
  for (int t = 0; t < (kTaps + 1) * kVec; ++t) sum[t / kVec][t % kVec] = A(0);
  if (c < s.c) {
    for (int64_t tile = first_tile + threadIdx.y; tile < last_tile; tile += blockDim.y) {
      const int64_t across = tile % tiling.across, down = tile / tiling.across % tiling.down, n = tile / tiling.across / tiling.down;
      const bool is_group = across < tiling.groups;
      const int64_t ox = is_group ? across * kColumns : tiling.groups * kColumns + across - tiling.groups, oy = down * of.tile_rows;
      const int64_t ix = ox * kStride - s.left, iy = oy * kStride - s.top;
      const int rows = int(oy + of.tile_rows < s.oh ? of.tile_rows : s.oh - oy);
      const scalar_t* grad = of.level.grad + n * out.image + c * out.channel + oy * out.row + ox * out.column;
      const scalar_t* x = of.level.x + n * in.image + c * in.channel + iy * in.row + ix * in.column;
      if (kColumns > 1 && is_group) {
        add_tile<kKernel, kStride, kColumns, kVec, kWide>(s, prologue, in, out, grad, x, rows, iy, ix, with_bias, sum);
      } else {
        add_tile<kKernel, kStride, 1, kVec, false>(s, prologue, in, out, grad, x, rows, iy, ix, with_bias, sum);
      }
    }
  }
  // shared: [tap][share][channel of the block]
  A* shared = shared_memory<A>();
  const int shares = kLanesShare ? blockDim.y / kWarpSize : blockDim.y, width = blockDim.x * kVec;
  const int share = kLanesShare ? threadIdx.y / kWarpSize : threadIdx.y;
#pragma unroll
  for (int t = 0; t <= kTaps; ++t) {
#pragma unroll
    for (int v = 0; v < kVec; ++v) {
      const A value = kLanesShare ? warp_sum(sum[t][v]) : sum[t][v];
      if (!kLanesShare || threadIdx.y % kWarpSize == 0) shared[(t * shares + share) * width + threadIdx.x * kVec + v] = value;
    }
  }
  __syncthreads();
  for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < (kTaps + 1) * width; i += blockDim.x * blockDim.y) {
    const int t = i / width, channel = i % width;
    if (first_channel + channel >= s.c) continue;
    A total[1] = {};
    for (int k = 0; k < shares; ++k) total[0] += shared[(t * shares + k) * width + channel];
    store_partial(partials + (int64_t(blockIdx.y) * (kTaps + 1) + t) * s.c + first_channel + channel, total);
  }
  add_chunks(finish, [&](const Chunks& chunks) { add_partials<kTaps, kVec>(chunks, s.c, width, partials, grad_weight, grad_bias); });
}
}  // namespace ef::depthwise_conv
