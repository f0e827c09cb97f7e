// Depthwise convolution, k x k, stride s, of one or several maps [n, c, h, w] in either layout; `a` = prologue(x), 0 outside.
//   forward      y[oy, ox] = bias + sum over ky, kx of weight[ky, kx] a[oy s - top + ky, ox s - left + kx]
//   grad input   a thread owns s kColumns neighboring columns of x, and adds each row of grad to the k rows of grad_x that it reaches
// Forward and grad input: a thread owns kVec channels x a few columns and marches down a slab of rows, with the rows that are not yet
// complete as accumulators in registers, so that every row is loaded once per slab and column group; lanes lie along the channels
// (channels_last) or along the columns. Bytes per element of size e: forward 2 e, grad input 2 e (3 e with a prologue).
//
//     a slab of x, rows from top to bottom       registers of the thread (k 3, s 1: three rows of y not yet complete)
//     row m     |..[columns, borders]..| ------> sum of y row m      += weight row 0 x values
//                 the next row is asked for      sum of y row m - 1  += weight row 1 x values
//                 before this one is used        sum of y row m - 2  += weight row 2 x values ------> y row m - 2
//     row m + 1 |..[columns, borders]..| ------> ... and the sum of row m - 2 begins anew as that of row m + 1
//
// The gradient of the filter lies in depthwise_conv_grad_weight_kernel.cuh.
// The maps travel with the launch as a table; each has a range of blocks, so that a block finds its map once and it is the same for all
// of its threads.
#pragma once
#include "../common/launch.cuh"
#include "../common/vec.cuh"
#include "depthwise_conv.h"

namespace ef::depthwise_conv {
inline constexpr int kThreads = 128;
// Blocks on a multiprocessor; 2, 3 or 4 leave 255, 168 or 128 registers: as many as the sums and the filter take.
template <int kKernel, typename scalar_t>
inline constexpr int kMinBlocks = kKernel == 5 || sizeof(scalar_t) == 8 ? 2 : 4;

struct Strides {
  int64_t image, channel, row, column;
};
EF_HD Strides strides_of(const Shape& s, int64_t h, int64_t w) {
  if (s.channels_last) return {h * w * s.c, 1, w * s.c, s.c};
  return {s.c * h * w, h * w, w, 1};
}

// A level's share of a launch: the blocks from first_block on (along the grid's x where threads march, along y where they sum), and
// slabs of slab_rows rows. `wide`: the thread's columns lie one after the other and aligned, in x and in y.
template <typename scalar_t>
struct Task {
  Level<scalar_t> level;
  int64_t first_block, slab_rows;
  int64_t chunk_units;  // of the filter's gradient: units of a block
  bool wide;
};
template <typename scalar_t>
struct Tasks {
  Task<scalar_t> task[kMaxLevels];  // those that are not there begin behind the last block
};
template <typename scalar_t>
__device__ const Task<scalar_t>& task_of(const Tasks<scalar_t>& tasks, unsigned block) {
  int i = 0;
#pragma unroll
  for (int k = 1; k < kMaxLevels; ++k) i += block >= tasks.task[k].first_block;
  return tasks.task[i];
}

// The channels and columns of a thread; flattened over (n, column group, channel group), or (n, channel group, column group) in nchw.
struct Cell {
  int64_t n, c, group;
  __device__ Cell(const Shape& s, int64_t i, int64_t channel_groups, int64_t column_groups, int vec) {
    const int64_t inner = s.channels_last ? channel_groups : column_groups, outer = s.channels_last ? column_groups : channel_groups;
    const int64_t first = i % inner, second = i / inner % outer;
    n = i / inner / outer;
    c = (s.channels_last ? first : second) * vec;
    group = s.channels_last ? second : first;
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

// The columns first + i of a row, i < kCount, that are inside it, as bits: they are the same in every row.
template <int kCount>
__device__ unsigned inside(int64_t first, int64_t columns) {
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) bits |= unsigned(first + i >= 0 && first + i < columns) << i;
  return bits;
}

// values[i] = row[i step] where `valid` has bit i, else zero. `wide`: kCenter columns from kBefore on are one aligned vector.
// `kSteps`: each address is a step from the one before, which the counts of instructions favor in all kernels but one.
template <int kBefore, int kCenter, bool kSteps = true, int kCount, int kVec, typename scalar_t, typename A>
__device__ void load_columns(const scalar_t* row, unsigned valid, int64_t step, bool wide, A (&values)[kCount][kVec]) {
  if constexpr (kVec == 1) {
    if (wide) {
      A center[kCenter];
      unpack(load_packed<kCenter>(row + kBefore), center);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const bool halo = i < kBefore || i >= kBefore + kCenter;
        if (halo) {
          values[i][0] = valid >> i & 1 ? A(row[i]) : A(0);
        } else {
          values[i][0] = center[halo ? 0 : i - kBefore];
        }
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (valid >> i & 1) {
      unpack(load_packed<kVec>(row), values[i]);
    } else {
#pragma unroll
      for (int v = 0; v < kVec; ++v) values[i][v] = A(0);  // and every prologue keeps it zero
    }
    row += step;
    if constexpr (kSteps) forget_origin(row);
  }
}

// row[i step] = values[i] where `valid` has bit i.
template <int kCount, int kVec, typename scalar_t, typename A>
__device__ void store_columns(scalar_t* row, unsigned valid, int64_t step, bool wide, const A (&values)[kCount][kVec]) {
  if constexpr (kVec == 1) {
    if (wide) {
      Vec<scalar_t, kCount> result;
#pragma unroll
      for (int i = 0; i < kCount; ++i) result.v[i] = scalar_t(values[i][0]);
      return store_vec<kCount>(row, result);
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    Vec<scalar_t, kVec> result;
#pragma unroll
    for (int v = 0; v < kVec; ++v) result.v[v] = scalar_t(values[i][v]);
    if (valid >> i & 1) store_vec<kVec>(row, result);
    row += step;
  }
}

// Those of `count` rows from row `first` of a map on that lie inside it, without the first `skipped`; counted from `first`.
struct RowRange {
  int begin;
  unsigned count;
  __device__ bool has(int row) const { return unsigned(row - begin) < count; }
};
__device__ inline RowRange rows_inside(int64_t first, int count, int64_t height, int skipped = 0) {
  const int64_t begin = first + skipped < 0 ? -first : skipped, end = first + count < height ? count : height - first;
  return {int(begin), unsigned(begin < end ? end - begin : 0)};
}

// Reads the columns of one row of a map after the other, as load_columns does. `kAhead` loads the next row before this one's arithmetic,
// which then hides the latency; the loaded columns stay in the storage dtype, and so take few registers.
template <int kBefore, int kCenter, int kCount, int kVec, bool kSteps, bool kAhead, typename scalar_t>
class Rows {
 public:
  __device__ Rows(const scalar_t* first, RowRange there, int64_t row_step, unsigned valid, int64_t column_step, bool wide)
      : row_(first), there_(there), row_step_(row_step), column_step_(column_step), valid_(valid), wide_(wide) {
    if constexpr (kAhead) fetch();
  }
  // The next row's; false, and nothing, where it does not exist. `kExists`: it is known to.
  template <bool kExists = false, typename A>
  __device__ bool next(A (&values)[kCount][kVec]) {
    const bool exists = kExists || there_.has(index_);
    if (exists) {
      if constexpr (kAhead) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) unpack(ahead_[i], values[i]);
      } else {
        load_columns<kBefore, kCenter, kSteps>(row_, valid_, column_step_, wide_, values);
      }
    }
    ++index_;
    row_ += row_step_;
    if constexpr (kAhead) fetch();
    return exists;
  }

 private:
  __device__ void fetch() {
    if (!there_.has(index_)) return;
    const scalar_t* column = row_;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (valid_ >> i & 1) ahead_[i] = load_packed<kVec>(column);
      column += column_step_;
      if constexpr (kSteps) forget_origin(column);
    }
  }

  const scalar_t* row_;
  RowRange there_;
  int64_t row_step_, column_step_;
  unsigned valid_;
  bool wide_;
  int index_ = 0;
  Packed<scalar_t, kVec> ahead_[kAhead ? kCount : 1] = {};  // columns outside stay zero, and every prologue keeps it
};

template <int kKernel, int kVec, typename scalar_t, typename A>
__device__ void load_filter(const scalar_t* weight, A (&filter)[kKernel][kKernel][kVec]) {
#pragma unroll
  for (int v = 0; v < kVec; ++v) {
#pragma unroll
    for (int t = 0; t < kKernel * kKernel; ++t) filter[t / kKernel][t % kKernel][v] = A(weight[v * kKernel * kKernel + t]);
  }
}

// In step m of a slab the input rows m s, ..., m s + s - 1 (counted from the first that it reaches) are added to its outputs m - a,
// through the taps ky = u + a s; then output m - kDepth is complete. Output m stays in the registers m % (kDepth + 1), which the loop's
// unrolling makes constants, and its first product is added to the bias.
template <int kKernel, int kStride, int kColumns, int kVec, typename scalar_t>
__global__ void __launch_bounds__(kThreads, kMinBlocks<kKernel, scalar_t>)
    depthwise_conv_kernel(const Tasks<scalar_t> tasks,
                          const scalar_t* __restrict__ weight,  // [c, k, k]
                          const scalar_t* __restrict__ bias) {  // [c], or null
  using A = acc_t<scalar_t>;
  constexpr int kDepth = (kKernel - 1) / kStride, kRows = kDepth + 1, kLoaded = (kColumns - 1) * kStride + kKernel;
  const Task<scalar_t>& task = task_of(tasks, blockIdx.x);
  const Shape& s = task.level.shape;
  const scalar_t* __restrict__ x = task.level.x;
  scalar_t* __restrict__ y = task.level.result;
  const int64_t channel_groups = s.c / kVec, column_groups = ceil_div(s.ow, kColumns), slab_rows = task.slab_rows;
  const int64_t i = int64_t(blockIdx.x - task.first_block) * blockDim.x + threadIdx.x;
  if (i >= s.n * channel_groups * column_groups || blockIdx.y * slab_rows >= s.oh) return;
  const Cell cell(s, i, channel_groups, column_groups, kVec);
  const Strides in = strides_of(s, s.h, s.w), out = strides_of(s, s.oh, s.ow);
  const int64_t ox = cell.group * kColumns, ix = ox * kStride - s.left;
  const int64_t oy = blockIdx.y * slab_rows, iy = oy * kStride - s.top;
  const int rows = int(oy + slab_rows < s.oh ? slab_rows : s.oh - oy);
  const RowRange there = rows_inside(iy, (rows + kDepth) * kStride, s.h);
  const unsigned valid = inside<kLoaded>(ix, s.w), kept = inside<kColumns>(ox, s.ow);
  const bool wide = kStride == 1 && task.wide;
  const Activation prologue = tasks.task[0].level.shape.prologue;  // of all; at a constant address
  x += cell.n * in.image + cell.c * in.channel + iy * in.row + ix * in.column;
  y += cell.n * out.image + cell.c * out.channel + oy * out.row + ox * out.column;

  Rows<kKernel / 2, kColumns, kLoaded, kVec, true, (kVec > 1), scalar_t> input(x, there, in.row, valid, in.column, wide);
  A filter[kKernel][kKernel][kVec], init[kVec], sum[kRows][kColumns][kVec];
  load_filter<kKernel, kVec>(weight + cell.c * kKernel * kKernel, filter);
#pragma unroll
  for (int v = 0; v < kVec; ++v) init[v] = bias ? A(bias[cell.c + v]) : A(0);
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
        store_columns(y, kept, out.column, wide, sum[(i + 1) % kRows]);
        y += out.row;
      }
    }
  }
}

// Rows and columns of the input are counted from the first zero of the padding: r = iy + top. Gradient row m reaches r = m s + ky;
// after it the rows m s, ..., m s + s - 1 are complete. Row r stays in the registers r % k, counted from the slab's first step. So are
// columns: those of the thread are group s kColumns + [0, s kColumns), but for stride 1 counted from the first column of the image, which
// leaves vectors of them aligned.
template <int kKernel, int kStride, int kColumns, int kVec, typename scalar_t>
__global__ void __launch_bounds__(kThreads, kMinBlocks<kKernel, scalar_t>)
    depthwise_conv_grad_input_kernel(const Tasks<scalar_t> tasks,
                                     const scalar_t* __restrict__ weight) {  // [c, k, k]
  using A = acc_t<scalar_t>;
  constexpr int kBefore = (kKernel - 1) / kStride;  // outputs to the left that still reach the thread's columns
  constexpr int kLoaded = kColumns + kBefore, kOwned = kColumns * kStride;
  const Task<scalar_t>& task = task_of(tasks, blockIdx.x);
  const Shape& s = task.level.shape;
  const scalar_t* __restrict__ grad = task.level.grad;
  const scalar_t* __restrict__ x = task.level.x;  // read only where there is a prologue
  scalar_t* __restrict__ grad_x = task.level.result;
  const int64_t channel_groups = s.c / kVec, column_groups = ceil_div(s.w + (kStride == 1 ? 0 : s.left), kOwned),
                slab_rows = task.slab_rows;
  const int64_t i = int64_t(blockIdx.x - task.first_block) * blockDim.x + threadIdx.x;
  const int64_t rows = ceil_div(s.h + s.top, kStride);  // steps over all rows of the input
  if (i >= s.n * channel_groups * column_groups || blockIdx.y * slab_rows >= rows) return;
  const Cell cell(s, i, channel_groups, column_groups, kVec);
  const Strides in = strides_of(s, s.h, s.w), out = strides_of(s, s.oh, s.ow);
  const int64_t ix = cell.group * kOwned - (kStride == 1 ? 0 : s.left), ox = kStride == 1 ? ix + s.left : cell.group * kColumns;
  const int64_t oy = blockIdx.y * slab_rows - kBefore, iy = oy * kStride - s.top;  // of the first step
  const int steps = int(oy + kBefore + slab_rows < rows ? slab_rows : rows - oy - kBefore) + kBefore;
  const RowRange there = rows_inside(oy, steps, s.oh), stored = rows_inside(iy, steps * kStride, s.h, kBefore * kStride);
  const unsigned valid = inside<kLoaded>(ox - kBefore, s.ow), kept = inside<kOwned>(ix, s.w);
  const bool wide = kStride == 1 && task.wide;
  const Activation prologue = tasks.task[0].level.shape.prologue;
  grad += cell.n * out.image + cell.c * out.channel + oy * out.row + (ox - kBefore) * out.column;
  const int64_t at = cell.n * in.image + cell.c * in.channel + iy * in.row + ix * in.column;
  x += at;
  grad_x += at;

  Rows<kKernel / 2, kColumns, kLoaded, kVec, false, (kVec > 1), scalar_t> output(grad, there, out.row, valid, out.column, wide);
  A filter[kKernel][kKernel][kVec], sum[kKernel][kOwned][kVec];
  load_filter<kKernel, kVec>(weight + cell.c * kKernel * kKernel, filter);
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
            A z[kOwned][kVec];
            load_columns<0, kOwned, false>(x, kept, in.column, wide, z);
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
          store_columns(grad_x, kept, in.column, wide, row);
        }
        x += in.row;
        grad_x += in.row;
      }
    }
  }
}
}  // namespace ef::depthwise_conv
