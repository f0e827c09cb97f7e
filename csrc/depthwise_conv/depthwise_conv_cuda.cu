#include <algorithm>

#include "../common/dtypes.h"
#include "depthwise_conv.h"
#include "depthwise_conv_kernel.cuh"

namespace ef::depthwise_conv {
namespace {
constexpr int64_t kSlabRows = 32;        // of a marching thread: it reads kernel - 1 rows more
constexpr int64_t kWeightBlocks = 1056;  // fills the largest part; fixed, so that a sum has the same bits on every device
constexpr int64_t kMinSlabPositions = 512;

// Pairs of channels x 4 columns where channels lie side by side in pairs, else single channels and columns.
template <typename scalar_t>
constexpr int kPair = sizeof(scalar_t) == 8 ? 1 : 2;
template <typename scalar_t, typename... T>
bool in_pairs(const Shape& s, const T*... pointers) {
  constexpr int kVec = kPair<scalar_t>;
  return s.channels_last && s.c % kVec == 0 && ((reinterpret_cast<uintptr_t>(pointers) % (kVec * sizeof(scalar_t)) == 0) && ...);
}

// Calls f.template operator()<kernel, stride, columns, vec>().
template <typename scalar_t, class F>
void specialise(const Shape& s, bool pairs, F&& f) {
  const auto with_filter = [&]<int kKernel, int kStride>() {
    pairs ? f.template operator()<kKernel, kStride, 4, kPair<scalar_t>>() : f.template operator()<kKernel, kStride, 1, 1>();
  };
  const auto with_kernel = [&]<int kKernel>() {
    s.stride == 1 ? with_filter.template operator()<kKernel, 1>() : with_filter.template operator()<kKernel, 2>();
  };
  s.kernel == 3 ? with_kernel.template operator()<3>() : with_kernel.template operator()<5>();
}

// The grid of a marching kernel over `rows` steps; slab_rows is set.
dim3 marching_grid(int64_t cells, int64_t rows, int64_t& slab_rows) {
  slab_rows = std::max(kSlabRows, ceil_div(rows, 65535));
  return dim3(unsigned(ceil_div(cells, kThreads)), unsigned(ceil_div(rows, slab_rows)));
}
}  // namespace

template <typename scalar_t>
void launch_forward(Cuda device, const Shape& s, const scalar_t* x, const scalar_t* weight, const scalar_t* bias, scalar_t* y) {
  specialise<scalar_t>(s, in_pairs<scalar_t>(s, x, y), [&]<int kKernel, int kStride, int kColumns, int kVec>() {
    const int64_t channel_groups = s.c / kVec, column_groups = ceil_div(s.ow, kColumns);
    int64_t slab_rows;
    const dim3 grid = marching_grid(s.n * channel_groups * column_groups, s.oh, slab_rows);
    launch("depthwise_conv", depthwise_conv_kernel<kKernel, kStride, kColumns, kVec, scalar_t>, grid, kThreads, 0, device, s,
           channel_groups, column_groups, slab_rows, x, weight, bias, y);
  });
}

template <typename scalar_t>
void launch_grad_input(Cuda device, const Shape& s, const scalar_t* grad, const scalar_t* x, const scalar_t* weight, scalar_t* grad_x) {
  specialise<scalar_t>(s, in_pairs<scalar_t>(s, grad, x, grad_x), [&]<int kKernel, int kStride, int kColumns, int kVec>() {
    constexpr int kOutputs = kColumns / kStride > 0 ? kColumns / kStride : 1;  // about kColumns columns of the input
    const int64_t channel_groups = s.c / kVec, column_groups = ceil_div(s.w + s.left, kOutputs * kStride);
    int64_t slab_rows;
    const dim3 grid = marching_grid(s.n * channel_groups * column_groups, ceil_div(s.h + s.top, kStride), slab_rows);
    launch("depthwise_conv_grad_input", depthwise_conv_grad_input_kernel<kKernel, kStride, kOutputs, kVec, scalar_t>, grid, kThreads, 0,
           device, s, channel_groups, column_groups, slab_rows, grad, x, weight, grad_x);
  });
}

namespace {
// Threads of a block: along the channels, and shares of the positions. Independent of the alignment, as the number of slabs is.
dim3 weight_block(const Shape& s, int vec) {
  unsigned x = 1;
  if (s.channels_last) {
    while (x < 32 && int64_t(x) * vec < s.c) x *= 2;
  }
  return dim3(x, kThreads / x);
}
}  // namespace

int64_t chunk_count(Cuda, const Shape& s) {
  const int64_t blocks = s.channels_last ? ceil_div(s.c, 64) : s.c;
  const int64_t most = std::min(s.n * s.oh, std::max<int64_t>(1, s.n * s.oh * s.ow / kMinSlabPositions));
  return std::clamp<int64_t>(kWeightBlocks / blocks, 1, most);
}

template <typename scalar_t>
void launch_grad_weight(Cuda device, const Shape& s, const scalar_t* grad, const scalar_t* x, acc_t<scalar_t>* partials,
                        scalar_t* grad_weight, scalar_t* grad_bias) {
  const int64_t slabs = chunk_count(device, s), slab_rows = ceil_div(s.n * s.oh, slabs);
  const int taps = s.kernel * s.kernel;
  specialise<scalar_t>(s, in_pairs<scalar_t>(s, grad, x), [&]<int kKernel, int kStride, int kColumns, int kVec>() {
    const dim3 block = weight_block(s, kVec);
    const dim3 grid(unsigned(ceil_div(s.c, int64_t(block.x) * kVec)), unsigned(slabs));
    const size_t bytes = (taps + 1) * size_t(kThreads) * kVec * sizeof(acc_t<scalar_t>);
    const auto run = [&]<bool kLanesShare>() {
      launch("depthwise_conv_grad_weight", depthwise_conv_grad_weight_kernel<kKernel, kStride, kColumns, kVec, kLanesShare, scalar_t>, grid,
             block, kLanesShare ? bytes / kWarpSize : bytes, device, s, slab_rows, grad, x, partials);
    };
    if constexpr (kColumns == 1) {
      if (!s.channels_last) return run.template operator()<true>();
    }
    run.template operator()<false>();
  });
  launch("depthwise_conv_add_slabs", add_slabs_kernel<scalar_t>, unsigned(ceil_div((taps + 1) * s.c, kThreads)), kThreads, 0, device, s.c,
         taps, slabs, partials, grad_weight, grad_bias);
}

#define EF_DEFINE(scalar_t)                                                                                          \
  template void launch_forward(Cuda, const Shape&, const scalar_t*, const scalar_t*, const scalar_t*, scalar_t*);    \
  template void launch_grad_input(Cuda, const Shape&, const scalar_t*, const scalar_t*, const scalar_t*, scalar_t*); \
  template void launch_grad_weight(Cuda, const Shape&, const scalar_t*, const scalar_t*, acc_t<scalar_t>*, scalar_t*, scalar_t*);
EF_FOR_EACH_FLOATING(EF_DEFINE)
#undef EF_DEFINE
}  // namespace ef::depthwise_conv
