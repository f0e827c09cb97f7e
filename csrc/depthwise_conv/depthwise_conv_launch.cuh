// Grids, specializations and launches of the depthwise kernels; each file depthwise_conv_cuda*.cu compiles them for some types.
#pragma once
#include <algorithm>
#include <limits>

#include "../common/platform.h"
#include "depthwise_conv.h"
#include "depthwise_conv_grad_weight_kernel.cuh"
#include "depthwise_conv_kernel.cuh"

namespace ef::depthwise_conv {
namespace {
constexpr int64_t kTileRows = 32;        // of a tile of the filter's gradient: a thread reads kernel - 1 rows more
constexpr int64_t kMinTileRows = 4;      // where taller tiles leave multiprocessors idle
constexpr int64_t kStartRows = 2;        // that a marching thread could do until its first one is there
constexpr int64_t kWeightChannels = 32;  // of a block of it in channels_last: more leave more lanes idle, and more to add to the last one

// A thread has 4 columns of a pair of channels where channels lie side by side in pairs, else of one channel. Of float64, which only
// gradient checks use, it has one value: such kernels compile in a quarter of the time.
template <typename scalar_t>
constexpr int kColumns = sizeof(scalar_t) == 8 ? 1 : 4;
template <typename scalar_t>
constexpr int kPair = sizeof(scalar_t) == 8 ? 1 : 2;
template <typename scalar_t>
bool is_aligned(const scalar_t* p, int values) {
  return reinterpret_cast<uintptr_t>(p) % (values * sizeof(scalar_t)) == 0;
}
template <typename scalar_t>
bool are_aligned(const Level<scalar_t>& level, int values) {
  return is_aligned(level.x, values) && is_aligned(level.grad, values) && is_aligned(level.result, values);
}
template <typename scalar_t>
bool reads_pairs(const Parameter<scalar_t>& weight) {
  return weight.full ? is_aligned(static_cast<const acc_t<scalar_t>*>(weight.data), kPair<scalar_t>)
                     : is_aligned(static_cast<const scalar_t*>(weight.data), kPair<scalar_t>);
}
template <typename scalar_t>
bool is_in_pairs(const Level<scalar_t>& level) {
  return level.shape.channels_last && level.shape.c % kPair<scalar_t> == 0 && are_aligned(level, kPair<scalar_t>);
}
// Whether the columns of a tile are one aligned vector in every row of x and y, with equally many zeros on both sides.
template <typename scalar_t>
bool is_wide(const Level<scalar_t>& level) {
  const Shape& s = level.shape;
  constexpr int kWide = kColumns<scalar_t>;
  return kWide > 1 && !s.channels_last && s.stride == 1 && s.left == s.kernel / 2 && s.ow == s.w && s.w % kWide == 0 &&
         are_aligned(level, kWide);
}

// Calls f.template operator()<kernel, stride, vec, wide>(). `weight`: none where the kernel does not read it.
template <typename scalar_t, class F>
void specialize(const Levels<scalar_t>& levels, const Parameter<scalar_t>& weight, F&& f) {
  const Shape& any = levels.level[0].shape;
  const auto all = [&](const auto& is) { return std::all_of(levels.level, levels.level + levels.count, is); };
  const bool pairs = reads_pairs(weight) && all(is_in_pairs<scalar_t>), wide = all(is_wide<scalar_t>);
  const auto with_filter = [&]<int kKernel, int kStride>() {
    if constexpr (kStride == 1 && kColumns<scalar_t> > 1) {
      if (wide) return f.template operator()<kKernel, kStride, 1, true>();
    }
    pairs ? f.template operator()<kKernel, kStride, kPair<scalar_t>, false>() : f.template operator()<kKernel, kStride, 1, false>();
  };
  const auto with_kernel = [&]<int kKernel>() {
    any.stride == 1 ? with_filter.template operator()<kKernel, 1>() : with_filter.template operator()<kKernel, 2>();
  };
  any.kernel == 3 ? with_kernel.template operator()<3>() : with_kernel.template operator()<5>();
}

// The levels with their shapes; where each begins and how it is cut is for the caller to say.
template <typename scalar_t>
TiledLevels<scalar_t> tiled(const Levels<scalar_t>& levels) {
  TiledLevels<scalar_t> result{};
  for (int i = 0; i < kMaxLevels; ++i) {
    TiledLevel<scalar_t>& of = result.level[i];
    of.first_block = std::numeric_limits<unsigned>::max();
    if (i >= levels.count) continue;
    of.level = levels.level[i];
    const Shape& s = of.level.shape;
    of.in = strides_of(s, s.h, s.w);
    of.out = strides_of(s, s.oh, s.ow);
  }
  return result;
}

// How a marching kernel sees a level: groups of channels and of columns, and rows.
struct Extent {
  int64_t channels, columns, rows;
};
// Cuts the levels into tiles, and returns how many blocks have them. The device runs `resident` blocks at a time; the tiles are of the
// height at which its threads together march down the fewest rows, those that are read for the first output and those that pass
// until the first is there (kStartRows) included. The result of a kernel does not depend on it.
template <typename scalar_t, class ExtentOf>
unsigned cut(TiledLevels<scalar_t>& levels, int count, int64_t resident, int64_t halo_rows, const ExtentOf& extent_of) {
  Extent extents[kMaxLevels];
  int64_t highest = 0;
  for (int i = 0; i < count; ++i) {
    extents[i] = extent_of(levels.level[i].level.shape);
    highest = std::max(highest, extents[i].rows);
  }
  // Of a level whose tiles have at most `rows` rows.
  const auto blocks_of = [&](int i, int64_t rows) {
    const Extent& e = extents[i];
    return ceil_div(levels.level[i].level.shape.n * ceil_div(e.rows, rows) * e.columns * e.channels, kThreads);
  };
  int64_t best_rows = highest, least = std::numeric_limits<int64_t>::max();
  for (int64_t ranges = 1; ranges == 1 || ceil_div(highest, ranges) >= kMinTileRows; ++ranges) {
    const int64_t rows = ceil_div(highest, ranges);
    int64_t blocks = 0;
    for (int i = 0; i < count; ++i) blocks += blocks_of(i, rows);
    const int64_t marched = ceil_div(blocks, resident) * (rows + halo_rows + kStartRows);
    if (marched < least) {
      least = marched;
      best_rows = rows;
    }
  }
  int64_t blocks = 0;
  for (int i = 0; i < count; ++i) {
    TiledLevel<scalar_t>& of = levels.level[i];
    const Extent& e = extents[i];
    const int64_t ranges = ceil_div(e.rows, best_rows);
    of.first_block = unsigned(blocks);
    of.tile_rows = int(ceil_div(e.rows, ranges));
    of.inner = Divisor(of.level.shape.channels_last ? e.channels : e.columns);
    of.outer = Divisor(of.level.shape.channels_last ? e.columns : e.channels);
    of.row_ranges = Divisor(ceil_div(e.rows, of.tile_rows));
    blocks += blocks_of(i, of.tile_rows);
  }
  if (blocks * kThreads > std::numeric_limits<int>::max()) throw std::runtime_error("depthwise_conv: the maps have too many elements");
  return unsigned(blocks);
}

// The filters of a block's threads.
template <int kKernel, int kVec, typename scalar_t>
size_t filter_bytes(const Shape& s) {
  return kVec == 1 ? 0 : size_t(pairs_of_block(s.c / kVec)) * kVec * kKernel * kKernel * sizeof(scalar_t);
}
}  // namespace

template <typename scalar_t>
void launch_forward(Cuda device, const Levels<scalar_t>& levels, Parameter<scalar_t> weight, Parameter<scalar_t> bias) {
  specialize(levels, weight, [&]<int kKernel, int kStride, int kVec, bool kWide>() {
    const auto kernel = depthwise_conv_kernel<kKernel, kStride, kColumns<scalar_t>, kVec, kWide, scalar_t>;
    const size_t bytes = filter_bytes<kKernel, kVec, scalar_t>(levels.level[0].shape);
    TiledLevels<scalar_t> all = tiled(levels);
    const unsigned blocks = cut(all, levels.count, resident_blocks(kernel, kThreads, bytes), (kKernel - 1) / kStride,
                                [](const Shape& s) { return Extent{s.c / kVec, ceil_div(s.ow, kColumns<scalar_t>), s.oh}; });
    launch("depthwise_conv", kernel, blocks, kThreads, bytes, device, all, weight, bias);
  });
}

template <typename scalar_t>
void launch_grad_input(Cuda device, const Levels<scalar_t>& levels, Parameter<scalar_t> weight) {
  specialize(levels, weight, [&]<int kKernel, int kStride, int kVec, bool kWide>() {
    constexpr int kOutputs = std::max(1, kColumns<scalar_t> / kStride);  // so that kColumns columns of the input are a thread's
    const auto kernel = depthwise_conv_grad_input_kernel<kKernel, kStride, kOutputs, kVec, kWide, scalar_t>;
    const size_t bytes = filter_bytes<kKernel, kVec, scalar_t>(levels.level[0].shape);
    TiledLevels<scalar_t> all = tiled(levels);
    const unsigned blocks = cut(all, levels.count, resident_blocks(kernel, kThreads, bytes), (kKernel - 1) / kStride, [](const Shape& s) {
      return Extent{s.c / kVec, ceil_div(s.w + (kStride == 1 ? 0 : s.left), kOutputs * kStride), ceil_div(s.h + s.top, kStride)};
    });
    launch("depthwise_conv_grad_input", kernel, blocks, kThreads, bytes, device, all, weight);
  });
}

namespace {
// Threads of a block: along the channels where those lie in pairs, and shares of the positions.
dim3 weight_block(const Shape& s, int vec) {
  unsigned x = 1;
  while (vec > 1 && int64_t(x) * vec < std::min(s.c, kWeightChannels)) x *= 2;
  return dim3(x, kThreads / x);
}
}  // namespace

template <typename scalar_t>
void launch_grad_weight(Cuda device, const Levels<scalar_t>& levels, acc_t<scalar_t>* partials, ParameterGradient<scalar_t> grad_weight,
                        ParameterGradient<scalar_t> grad_bias) {
  const Shape& any = levels.level[0].shape;
  const int taps = any.kernel * any.kernel;
  TiledLevels<scalar_t> all = tiled(levels);
  int64_t chunks = 0;
  specialize(levels, Parameter<scalar_t>{}, [&]<int kKernel, int kStride, int kVec, bool kWide>() {
    const dim3 block = weight_block(any, kVec);
    for (int i = 0; i < levels.count; ++i) {
      TiledLevel<scalar_t>& of = all.level[i];
      const Shape& s = of.level.shape;
      const int64_t count = chunk_count(device, s);
      of.first_block = unsigned(chunks);
      of.tile_rows = kTileRows;
      while (of.tile_rows > kMinTileRows && tiling_of(s, kColumns<scalar_t>, of.tile_rows).count < count * block.y) of.tile_rows /= 2;
      of.chunk_tiles = ceil_div(tiling_of(s, kColumns<scalar_t>, of.tile_rows).count, count);
      chunks += count;
    }
    const dim3 grid(unsigned(ceil_div(any.c, int64_t(block.x) * kVec)), unsigned(chunks));
    const size_t bytes = (taps + 1) * size_t(kThreads) * kVec * sizeof(acc_t<scalar_t>);
    launch("depthwise_conv_grad_weight", depthwise_conv_grad_weight_kernel<kKernel, kStride, kColumns<scalar_t>, kVec, kWide, scalar_t>,
           grid, block, kVec == 1 ? bytes / kWarpSize : bytes, device, all, grad_bias.data != nullptr, finish_of(device, grid), partials,
           grad_weight, grad_bias);
  });
}

#define EF_DEFINE_LAUNCHES(scalar_t)                                                                             \
  template void launch_forward(Cuda, const Levels<scalar_t>&, Parameter<scalar_t>, Parameter<scalar_t>);         \
  template void launch_grad_input(Cuda, const Levels<scalar_t>&, Parameter<scalar_t>);                           \
  template void launch_grad_weight(Cuda, const Levels<scalar_t>&, acc_t<scalar_t>*, ParameterGradient<scalar_t>, \
                                   ParameterGradient<scalar_t>);
}  // namespace ef::depthwise_conv
