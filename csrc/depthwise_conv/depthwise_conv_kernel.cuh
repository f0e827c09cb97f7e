// Depthwise convolution, k x k, stride s, of one or several maps [n, c, h, w] in either layout; `a` = prologue(x), 0 outside.
//   forward      y[oy, ox] = bias + sum over ky, kx of weight[ky, kx] a[oy s - top + ky, ox s - left + kx]
//   grad input   a thread owns s kColumns neighboring columns of x, and adds each row of grad to the k rows of grad_x that it reaches
// Forward and grad input: a thread owns a tile, kVec channels x a few columns x some rows, and marches down its rows, with those that are
// not yet complete as accumulators in registers, so that every row is loaded once per tile; lanes lie along the channels (channels_last)
// or along the columns. Bytes per element of size e: forward 2 e, grad input 2 e (3 e with a prologue); the halo between tiles comes from
// the cache.
//
//     rows of x, from the tile's first halo on   registers of the thread (k 3, s 1: three rows of y not yet complete)
//     row m     |halo [columns] halo| ---------> sum of y row m      += weight row 0 x values
//                 the next row is asked for      sum of y row m - 1  += weight row 1 x values
//                 before this one is used        sum of y row m - 2  += weight row 2 x values ------> y row m - 2
//     row m + 1 |halo [columns] halo| ---------> ... and the sum of row m - 2 begins anew as that of row m + 1
//
// The gradient of the filter lies in depthwise_conv_grad_weight_kernel.cuh.
// The maps travel with the launch as a table; each has a range of blocks, so that a block finds its map once and it is the same for all
// of its threads.
#pragma once
#include "../common/divisor.h"
#include "depthwise_conv_rows.cuh"

namespace ef::depthwise_conv {
// Blocks on a multiprocessor; 2, 3, 4 or 5 leave 255, 168, 128 or 102 registers: as many as the sums and the filter take, halves of which
// wait in words.
template <int kKernel, int kStride, typename scalar_t>
inline constexpr int kMinBlocks =
    (kKernel == 3 && sizeof(scalar_t) < 8 ? 4 : 2) + (sizeof(scalar_t) == 2 && (kKernel == 5 || kStride == 1));
// Only this filter costs so many instructions to unpack in each row that the registers are worth it.
template <int kKernel, int kStride>
inline constexpr bool kUnpacks = kKernel == 5 && kStride == 1;

// A level's share of a launch: the blocks from first_block on (along the grid's x where threads march, along y where they sum).
template <typename scalar_t>
struct TiledLevel {
  Level<scalar_t> level;
  Strides in, out;  // of x and of y
  unsigned first_block;
  int tile_rows;
  // Of the marching kernels: neighboring tiles along the lanes, rows of tiles along the other of columns and channels, and down the rows.
  Divisor inner, outer, row_ranges;
  int64_t chunk_tiles;  // of the filter's gradient: tiles of a block
};
template <typename scalar_t>
struct TiledLevels {
  TiledLevel<scalar_t> level[kMaxLevels];  // those that are not there begin behind the last block
};
template <typename scalar_t>
__device__ const TiledLevel<scalar_t>& level_of(const TiledLevels<scalar_t>& levels, unsigned block) {
  int i = 0;
#pragma unroll
  for (int k = 1; k < kMaxLevels; ++k) i += block >= levels.level[k].first_block;
  return levels.level[i];
}

// A thread's tile of a marching kernel. Tiles are counted along the channels, then along the columns (in nchw along these first), then down
// the rows, then over the images: those that share a halo are in flight at about the same time.
struct Tile {
  int64_t n;                    // the image; behind the last one: no tile
  int channels, columns, rows;  // which groups of channels and columns, and which range of rows
  template <typename scalar_t>
  __device__ Tile(const TiledLevel<scalar_t>& of, unsigned i) {
    const unsigned row = of.inner.quotient(i), range = of.outer.quotient(row), first = i - row * of.inner.value,
                   second = row - range * of.outer.value;
    const bool along_channels = of.level.shape.channels_last;
    n = of.row_ranges.quotient(range);
    rows = range - unsigned(n) * of.row_ranges.value;
    channels = along_channels ? first : second;
    columns = along_channels ? second : first;
  }
};

template <int kCount, int kVec, typename A>
__device__ void activate_all(Activation prologue, A (&x)[kCount][kVec]) {
  const auto apply = [&]<Activation kPrologue>() {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int v = 0; v < kVec; ++v) x[i][v] = activate<kPrologue>(x[i][v]);
    }
  };
  static_assert(count_of(Activation{}) == 4, "a branch for the new activation");
  if (prologue > Activation::kSilu) {  // by order: of equalities nvcc makes a table of jumps, dearer than the usual case deserves
    prologue == Activation::kRelu ? apply.template operator()<Activation::kRelu>() : apply.template operator()<Activation::kRelu6>();
  } else if (prologue > Activation::kNone) {
    apply.template operator()<Activation::kSilu>();
  }
}

// In step m of a tile the input rows m s, ..., m s + s - 1 (counted from the first that it reaches) are added to its outputs m - a,
// through the taps ky = u + a s; then output m - kDepth is complete. Output m stays in the registers m % (kDepth + 1), which the loop's
// unrolling makes constants, and its first product is added to the bias.
template <int kKernel, int kStride, int kColumns, int kVec, bool kWide, typename scalar_t>
__global__ void __launch_bounds__(kThreads, kMinBlocks<kKernel, kStride, scalar_t>)
    depthwise_conv_kernel(const TiledLevels<scalar_t> levels,
                          const Parameter<scalar_t> weight,  // [c, k, k]
                          const Parameter<scalar_t> bias) {  // [c], or null
  using A = acc_t<scalar_t>;
  constexpr int kDepth = (kKernel - 1) / kStride, kRows = kDepth + 1, kLoaded = (kColumns - 1) * kStride + kKernel;
  const TiledLevel<scalar_t>& of = level_of(levels, blockIdx.x);
  const Shape& s = of.level.shape;
  const scalar_t* __restrict__ x = of.level.x;
  scalar_t* __restrict__ y = of.level.result;
  const unsigned first_tile = (blockIdx.x - of.first_block) * kThreads;
  const Tile tile(of, first_tile + threadIdx.x);
  const Strides in = of.in.kept(), out = of.out.kept();
  const int ox = tile.columns * kColumns, ix = ox * kStride - int(s.left);
  const int64_t oy = int64_t(tile.rows) * of.tile_rows, iy = oy * kStride - s.top;
  const int rows = int(oy + of.tile_rows < s.oh ? of.tile_rows : s.oh - oy);
  const RowRange there = rows_inside(iy, tile.n < s.n ? (rows + kDepth) * kStride : 0, s.h);
  const unsigned valid = inside<kLoaded>(ix, s.w), kept = inside<kColumns>(ox, s.ow);
  const Activation prologue = levels.level[0].level.shape.prologue;  // of all; at a constant address
  x += tile.n * in.image + tile.channels * kVec * in.channel + iy * in.row + ix * in.column;
  y += tile.n * out.image + tile.channels * kVec * out.channel + oy * out.row + ox * out.column;

  Rows<kKernel / 2, kWide ? kColumns : 1, kLoaded, kVec, true, (sizeof(scalar_t) < 8), scalar_t> input(x, there, in.row, valid, in.column);
  A filter[kKernel][kKernel][kVec], init[kVec], sum[kRows][kColumns][kVec];
  load_filter<kKernel, kVec, kUnpacks<kKernel, kStride>>(weight, tile.channels, of.inner.remainder(first_tile), of.inner.value, filter);
  if (tile.n >= s.n) return;
#pragma unroll
  for (int v = 0; v < kVec; ++v) init[v] = bias.data ? bias[tile.channels * kVec + v] : A(0);
#pragma unroll
  for (int j = 0; j < kRows * kColumns * kVec; ++j) sum[j / (kColumns * kVec)][j / kVec % kColumns][j % kVec] = init[j % kVec];
  for (int first = 0;; first += kRows) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int m = first + i;
      if (m >= rows + kDepth) return;
#pragma unroll
      for (int u = 0; u < kStride; ++u) {
        A values[kLoaded][kVec];
        if (input.next(values)) {
          activate_all(prologue, values);
#pragma unroll
          for (int ky = u; ky < kKernel; ky += kStride) {
#pragma unroll
            for (int kx = 0; kx < kKernel; ++kx) {
#pragma unroll
              for (int j = 0; j < kColumns; ++j) {
#pragma unroll
                for (int v = 0; v < kVec; ++v) {
                  A& total = sum[(i - ky / kStride + kRows) % kRows][j][v];
                  total = (ky == 0 && kx == 0 ? init[v] : total) + filter[ky][kx][v] * values[j * kStride + kx][v];
                }
              }
            }
          }
        } else if (u == 0) {
#pragma unroll
          for (int j = 0; j < kColumns * kVec; ++j) sum[i][j / kVec][j % kVec] = init[j % kVec];
        }
      }
      if (m >= kDepth) {
        store_columns<kWide>(y, kept, out.column, sum[(i + 1) % kRows]);
        y += out.row;
      }
    }
  }
}

// Rows and columns of the input are counted from the first zero of the padding: r = iy + top. Gradient row m reaches r = m s + ky;
// after it the rows m s, ..., m s + s - 1 are complete. Row r stays in the registers r % k, counted from the tile's first step. So are
// columns: those of the thread are group s kColumns + [0, s kColumns), but for stride 1 counted from the first column of the image, which
// leaves vectors of them aligned.
template <int kKernel, int kStride, int kColumns, int kVec, bool kWide, typename scalar_t>
__global__ void __launch_bounds__(kThreads, kMinBlocks<kKernel, kStride, scalar_t>)
    depthwise_conv_grad_input_kernel(const TiledLevels<scalar_t> levels,
                                     const Parameter<scalar_t> weight) {  // [c, k, k]
  using A = acc_t<scalar_t>;
  constexpr int kBefore = (kKernel - 1) / kStride;  // outputs to the left that still reach the thread's columns
  constexpr int kLoaded = kColumns + kBefore, kOwned = kColumns * kStride;
  const TiledLevel<scalar_t>& of = level_of(levels, blockIdx.x);
  const Shape& s = of.level.shape;
  const scalar_t* __restrict__ grad = of.level.grad;
  const scalar_t* __restrict__ x = of.level.x;  // read only where there is a prologue
  scalar_t* __restrict__ grad_x = of.level.result;
  const int64_t rows = ceil_div(s.h + s.top, kStride);  // steps over all rows of the input
  const unsigned first_tile = (blockIdx.x - of.first_block) * kThreads;
  const Tile tile(of, first_tile + threadIdx.x);
  const Strides in = of.in.kept(), out = of.out.kept();
  const int ix = tile.columns * kOwned - (kStride == 1 ? 0 : int(s.left)), ox = kStride == 1 ? ix + int(s.left) : tile.columns * kColumns;
  const int64_t oy = int64_t(tile.rows) * of.tile_rows - kBefore, iy = oy * kStride - s.top;  // of the first step
  const int steps = int(oy + kBefore + of.tile_rows < rows ? of.tile_rows : rows - oy - kBefore) + kBefore;
  const RowRange there = rows_inside(oy, tile.n < s.n ? steps : 0, s.oh), stored = rows_inside(iy, steps * kStride, s.h, kBefore * kStride);
  const unsigned valid = inside<kLoaded>(ox - kBefore, s.ow), kept = inside<kOwned>(ix, s.w);
  const Activation prologue = levels.level[0].level.shape.prologue;
  grad += tile.n * out.image + tile.channels * kVec * out.channel + oy * out.row + (ox - kBefore) * out.column;
  const int64_t at = tile.n * in.image + tile.channels * kVec * in.channel + iy * in.row + ix * in.column;
  x += at;
  grad_x += at;

  Rows<kKernel / 2, kWide ? kColumns : 1, kLoaded, kVec, false, (sizeof(scalar_t) < 8), scalar_t> output(grad, there, out.row, valid,
                                                                                                         out.column);
  A filter[kKernel][kKernel][kVec], sum[kKernel][kOwned][kVec];
  load_filter<kKernel, kVec, kUnpacks<kKernel, kStride>>(weight, tile.channels, of.inner.remainder(first_tile), of.inner.value, filter);
  if (tile.n >= s.n) return;
#pragma unroll
  for (int j = 0; j < kKernel * kOwned * kVec; ++j) sum[j / (kOwned * kVec)][j / kVec % kOwned][j % kVec] = A(0);
  for (int first = 0;; first += kKernel) {
#pragma unroll
    for (int i = 0; i < kKernel; ++i) {
      const int m = first + i;
      if (m >= steps) return;
      A values[kLoaded][kVec];
      if (output.next(values)) {
#pragma unroll
        for (int ky = 0; ky < kKernel; ++ky) {
#pragma unroll
          for (int j = 0; j < kOwned; ++j) {
#pragma unroll
            for (int l = 0; l < kLoaded; ++l) {
              const int kx = j - (l - kBefore) * kStride;
              if (kx < 0 || kx >= kKernel) continue;
              const bool is_first = ky + kStride >= kKernel && kx + kStride >= kKernel;
#pragma unroll
              for (int v = 0; v < kVec; ++v) {
                A& total = sum[(i * kStride + ky) % kKernel][j][v];
                total = (is_first ? A(0) : total) + filter[ky][kx][v] * values[l][v];
              }
            }
          }
        }
      } else {
#pragma unroll
        for (int ky = kKernel - kStride; ky < kKernel; ++ky) {
#pragma unroll
          for (int j = 0; j < kOwned * kVec; ++j) sum[(i * kStride + ky) % kKernel][j / kVec][j % kVec] = A(0);
        }
      }
#pragma unroll
      for (int u = 0; u < kStride; ++u) {
        if (stored.has(m * kStride + u)) {
          auto& row = sum[(i * kStride + u) % kKernel];
          if (prologue != Activation::kNone) {
            Columns<0, kWide ? kOwned : 1, kOwned, kVec, false, scalar_t> columns;
            A z[kOwned][kVec];
            columns.load(x, kept, in.column);
            columns.unpack_to(z);
#pragma unroll
            for (int j = 0; j < kOwned * kVec; ++j) {
              const A value = z[j / kVec][j % kVec];
              A& grad = row[j / kVec][j % kVec];
              static_assert(count_of(Activation{}) == 4, "a branch for the new activation");
              grad = prologue == Activation::kSilu   ? activate_backward<Activation::kSilu>(grad, value)
                     : prologue == Activation::kRelu ? activate_backward<Activation::kRelu>(grad, value)
                                                     : activate_backward<Activation::kRelu6>(grad, value);
            }
          }
          store_columns<kWide>(grad_x, kept, in.column, row);
        }
        x += in.row;
        grad_x += in.row;
      }
    }
  }
}
}  // namespace ef::depthwise_conv
