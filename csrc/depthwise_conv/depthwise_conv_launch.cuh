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
constexpr int64_t kSlabRows = 32;         // of a marching thread: it reads kernel - 1 rows more
constexpr int64_t kMinSlabRows = 4;       // where taller slabs leave multiprocessors idle
constexpr int64_t kMarchingBlocks = 528;  // four on each multiprocessor of the largest part

// A thread has 4 columns of a pair of channels where channels lie side by side in pairs, else of one channel. Of float64, which only
// gradient checks use, it has one value: such kernels compile in a quarter of the time.
template <typename scalar_t>
constexpr int kColumns = sizeof(scalar_t) == 8 ? 1 : 4;
template <typename scalar_t>
constexpr int kPair = sizeof(scalar_t) == 8 ? 1 : 2;
template <typename scalar_t>
bool in_pairs(const Levels<scalar_t>& levels) {
  constexpr int kVec = kPair<scalar_t>;
  const auto aligned = [](const scalar_t* p) { return reinterpret_cast<uintptr_t>(p) % (kVec * sizeof(scalar_t)) == 0; };
  const Shape& any = levels.level[0].shape;
  return any.channels_last && any.c % kVec == 0 &&
         std::all_of(levels.level, levels.level + levels.count,
                     [&](const Level<scalar_t>& level) { return aligned(level.x) && aligned(level.grad) && aligned(level.result); });
}

// Whether 4 columns of a row are one aligned vector in every row of x and y, with equally many zeros on both sides.
template <typename scalar_t>
bool is_wide(const Level<scalar_t>& level) {
  const Shape& s = level.shape;
  constexpr int kWide = kColumns<scalar_t>;
  const auto aligned = [](const scalar_t* p) { return reinterpret_cast<uintptr_t>(p) % (kWide * sizeof(scalar_t)) == 0; };
  return !s.channels_last && s.stride == 1 && s.left == s.kernel / 2 && s.ow == s.w && s.w % kWide == 0 && aligned(level.x) &&
         aligned(level.grad) && aligned(level.result);
}

// Calls f.template operator()<kernel, stride, vec>().
template <typename scalar_t, class F>
void specialize(const Shape& s, bool pairs, F&& f) {
  const auto with_filter = [&]<int kKernel, int kStride>() {
    pairs ? f.template operator()<kKernel, kStride, kPair<scalar_t>>() : f.template operator()<kKernel, kStride, 1>();
  };
  const auto with_kernel = [&]<int kKernel>() {
    s.stride == 1 ? with_filter.template operator()<kKernel, 1>() : with_filter.template operator()<kKernel, 2>();
  };
  s.kernel == 3 ? with_kernel.template operator()<3>() : with_kernel.template operator()<5>();
}

// One task a level, with its shape; where it begins and its slabs are for the caller to say.
template <typename scalar_t>
Tasks<scalar_t> tasks_of(const Levels<scalar_t>& levels) {
  Tasks<scalar_t> tasks;
  for (int i = 0; i < kMaxLevels; ++i) {
    tasks.task[i] = {i < levels.count ? levels.level[i] : Level<scalar_t>{}, std::numeric_limits<int64_t>::max(), 0, 0,
                     i < levels.count && is_wide(levels.level[i])};
  }
  return tasks;
}

// The grid of a marching kernel in which a level has so many cells and `rows` steps; completes the tasks.
template <typename scalar_t, class Cells, class Rows>
dim3 marching_grid(int levels, Tasks<scalar_t>& tasks, const Cells& cells, const Rows& rows) {
  int64_t blocks = 0, slabs = 0, all = 0;
  for (int64_t slab_rows = kSlabRows; all < kMarchingBlocks && slab_rows >= kMinSlabRows; slab_rows /= 2) {
    blocks = slabs = all = 0;
    for (int i = 0; i < levels; ++i) {
      Task<scalar_t>& task = tasks.task[i];
      const Shape& s = task.level.shape;
      task.first_block = blocks;
      task.slab_rows = std::max(slab_rows, ceil_div(rows(s), 65535));
      blocks += ceil_div(cells(s), kThreads);
      slabs = std::max(slabs, ceil_div(rows(s), task.slab_rows));
      all += ceil_div(cells(s), kThreads) * ceil_div(rows(s), task.slab_rows);
    }
  }
  return dim3(unsigned(blocks), unsigned(slabs));
}
}  // namespace

template <typename scalar_t>
void launch_forward(Cuda device, const Levels<scalar_t>& levels, const scalar_t* weight, const scalar_t* bias) {
  specialize<scalar_t>(levels.level[0].shape, in_pairs(levels), [&]<int kKernel, int kStride, int kVec>() {
    Tasks<scalar_t> tasks = tasks_of(levels);
    const dim3 grid = marching_grid(
        levels.count, tasks, [](const Shape& s) { return s.n * (s.c / kVec) * ceil_div(s.ow, kColumns<scalar_t>); },
        [](const Shape& s) { return s.oh; });
    launch("depthwise_conv", depthwise_conv_kernel<kKernel, kStride, kColumns<scalar_t>, kVec, scalar_t>, grid, kThreads, 0, device, tasks,
           weight, bias);
  });
}

template <typename scalar_t>
void launch_grad_input(Cuda device, const Levels<scalar_t>& levels, const scalar_t* weight) {
  specialize<scalar_t>(levels.level[0].shape, in_pairs(levels), [&]<int kKernel, int kStride, int kVec>() {
    constexpr int kOutputs = std::max(1, kColumns<scalar_t> / kStride);  // so that kColumns columns of the input are a thread's
    Tasks<scalar_t> tasks = tasks_of(levels);
    const dim3 grid = marching_grid(
        levels.count, tasks,
        [](const Shape& s) { return s.n * (s.c / kVec) * ceil_div(s.w + (kStride == 1 ? 0 : s.left), kOutputs * kStride); },
        [](const Shape& s) { return ceil_div(s.h + s.top, kStride); });
    launch("depthwise_conv_grad_input", depthwise_conv_grad_input_kernel<kKernel, kStride, kOutputs, kVec, scalar_t>, grid, kThreads, 0,
           device, tasks, weight);
  });
}

namespace {
// Threads of a block: along the channels where those lie in pairs, and shares of the positions.
dim3 weight_block(const Shape& s, int vec) {
  unsigned x = 1;
  while (vec > 1 && x < 32 && int64_t(x) * vec < s.c) x *= 2;
  return dim3(x, kThreads / x);
}
}  // namespace

template <typename scalar_t>
void launch_grad_weight(Cuda device, const Levels<scalar_t>& levels, acc_t<scalar_t>* partials, scalar_t* grad_weight,
                        scalar_t* grad_bias) {
  const Shape& any = levels.level[0].shape;
  const int taps = any.kernel * any.kernel;
  Tasks<scalar_t> tasks = tasks_of(levels);
  int64_t chunks = 0;
  specialize<scalar_t>(any, in_pairs(levels), [&]<int kKernel, int kStride, int kVec>() {
    const dim3 block = weight_block(any, kVec);
    for (int i = 0; i < levels.count; ++i) {
      Task<scalar_t>& task = tasks.task[i];
      const Shape& s = task.level.shape;
      const int64_t count = chunk_count(device, s);
      task.first_block = chunks;
      task.slab_rows = kSlabRows;
      while (task.slab_rows > kMinSlabRows && units_of(s, kColumns<scalar_t>, task.slab_rows).count < count * block.y) task.slab_rows /= 2;
      task.chunk_units = ceil_div(units_of(s, kColumns<scalar_t>, task.slab_rows).count, count);
      chunks += count;
    }
    const dim3 grid(unsigned(ceil_div(any.c, int64_t(block.x) * kVec)), unsigned(chunks));
    const size_t bytes = (taps + 1) * size_t(kThreads) * kVec * sizeof(acc_t<scalar_t>);
    launch("depthwise_conv_grad_weight", depthwise_conv_grad_weight_kernel<kKernel, kStride, kColumns<scalar_t>, kVec, scalar_t>, grid,
           block, kVec == 1 ? bytes / kWarpSize : bytes, device, tasks, grad_bias != nullptr, partials);
  });
  launch("depthwise_conv_add_slabs", add_slabs_kernel<scalar_t>, unsigned(ceil_div((taps + 1) * any.c, kWarpSize)),
         dim3(kWarpSize, kSlabShares), kSlabShares * kWarpSize * sizeof(acc_t<scalar_t>), device, any.c, taps, chunks, partials,
         grad_weight, grad_bias);
}

#define EF_DEFINE_LAUNCHES(scalar_t)                                                             \
  template void launch_forward(Cuda, const Levels<scalar_t>&, const scalar_t*, const scalar_t*); \
  template void launch_grad_input(Cuda, const Levels<scalar_t>&, const scalar_t*);               \
  template void launch_grad_weight(Cuda, const Levels<scalar_t>&, acc_t<scalar_t>*, scalar_t*, scalar_t*);
}  // namespace ef::depthwise_conv
