#include <algorithm>

#include "../common/platform.h"
#include "batch_norm_act.h"
#include "batch_norm_act_kernel.cuh"

namespace ef::batch_norm_act {
namespace {
constexpr int64_t kMaxBlocks = 132 * 8;  // fills the largest GPU; fixed, so that sums have the same bits on every device
constexpr int64_t kPixelsPerThread = 16;
constexpr size_t kFinishBytes = kFinishChannels * kFinishRows * sizeof(double);

struct Grid {
  dim3 blocks;
  Layout layout;
};
Grid grid_for(const Shape& s, int vec) {
  if (s.inner > 1) {
    const int64_t pieces = ceil_div(s.inner, kPiece), warps = s.n * s.c * pieces;
    return {dim3(unsigned(ceil_div(warps, kThreads / kWarpSize))), {0, 0, kPiece, pieces, s.n * pieces}};
  }
  const int64_t all = s.c / vec, side_by_side = ceil_div(all, kWarpSize), columns = ceil_div(all, side_by_side), rows = kThreads / columns;
  const int64_t most_chunks = std::max<int64_t>(1, kMaxBlocks / side_by_side), wanted = ceil_div(s.n, rows * kPixelsPerThread);
  const int64_t size = ceil_div(s.n, std::min(most_chunks, wanted)), chunks = ceil_div(s.n, size);
  return {dim3(unsigned(chunks), unsigned(side_by_side)), {columns, rows, size, 1, chunks}};
}

// Calls f.template operator()<kPixels, kVec>(grid) for a shape whose buffers are all aligned, or not.
template <typename scalar_t, class F>
void specialize(const Shape& s, bool aligned, F&& f) {
  constexpr int kVec = kVecSize<scalar_t>;
  const bool pixels = s.inner == 1, vectors = aligned && (pixels ? s.c : s.inner) % kVec == 0;
  const Grid grid = grid_for(s, vectors ? kVec : 1);
  if (pixels) {
    vectors ? f.template operator()<true, kVec>(grid) : f.template operator()<true, 1>(grid);
  } else {
    vectors ? f.template operator()<false, kVec>(grid) : f.template operator()<false, 1>(grid);
  }
}
template <bool kPixels, int kVec, typename A>
size_t sum_bytes(const Layout& l) {
  return kPixels ? row_sum_bytes<kVec, 2, A>(l.rows, l.columns) : 0;
}
// What belongs to a channel is read by vectors where the maps are.
template <typename A>
bool is_vec_aligned(const Norm<A>& norm) {
  return ef::is_vec_aligned(norm.mean, norm.var, norm.weight, norm.bias);
}
dim3 finish_blocks(const Shape& s) { return dim3(unsigned(ceil_div(s.c, kFinishChannels))); }
}  // namespace

// Enough for all vector sizes.
int64_t partial_count(Cuda, const Shape& s) {
  int64_t max_chunks = 0;
  for (const int vec : {1, 2, 4, 8})
    if (s.c % vec == 0) max_chunks = std::max(max_chunks, grid_for(s, vec).layout.chunks);
  return max_chunks;
}

template <typename scalar_t>
void launch_stats(Cuda device, const Shape& s, const scalar_t* x, acc_t<scalar_t>* partials,
                  const Statistics<acc_t<scalar_t>>& statistics) {
  using A = acc_t<scalar_t>;
  specialize<scalar_t>(s, ef::is_vec_aligned(x), [&]<bool kPixels, int kVec>(const Grid& grid) {
    launch("batch_norm_stats", batch_norm_stats_kernel<kPixels, kVec, scalar_t>, grid.blocks, kThreads,
           sum_bytes<kPixels, kVec, A>(grid.layout), device, s, grid.layout, x, partials);
    launch("batch_norm_finish_stats", batch_norm_finish_stats_kernel<kPixels, A>, finish_blocks(s), dim3(kFinishChannels, kFinishRows),
           kFinishBytes, device, s, grid.layout, partials, statistics);
  });
}

template <typename scalar_t>
void launch_forward(Cuda device, const Shape& s, const Norm<acc_t<scalar_t>>& norm, const scalar_t* x, scalar_t* y) {
  specialize<scalar_t>(s, ef::is_vec_aligned(x, y) && is_vec_aligned(norm), [&]<bool kPixels, int kVec>(const Grid& grid) {
    dispatch_activation(int64_t(norm.activation), [&]<Activation kActivation>() {
      launch("batch_norm_act", batch_norm_act_kernel<kPixels, kVec, kActivation, scalar_t>, grid.blocks, kThreads, 0, device, s,
             grid.layout, norm, x, y);
    });
  });
}

template <typename scalar_t>
void launch_train(Cuda device, const Shape& s, const Norm<acc_t<scalar_t>>& norm, const scalar_t* x, acc_t<scalar_t>* partials,
                  const Statistics<acc_t<scalar_t>>& statistics, scalar_t* y) {
  launch_stats(device, s, x, partials, statistics);
  launch_forward(device, s, norm, x, y);
}

template <typename scalar_t>
void launch_sums(Cuda device, const Shape& s, const Norm<acc_t<scalar_t>>& norm, const Gradients<scalar_t>& in) {
  using A = acc_t<scalar_t>;
  specialize<scalar_t>(s, ef::is_vec_aligned(in.grad, in.x) && is_vec_aligned(norm), [&]<bool kPixels, int kVec>(const Grid& grid) {
    dispatch_activation(int64_t(norm.activation), [&]<Activation kActivation>() {
      launch("batch_norm_act_sums", batch_norm_act_sums_kernel<kPixels, kVec, kActivation, scalar_t>, grid.blocks, kThreads,
             sum_bytes<kPixels, kVec, A>(grid.layout), device, s, grid.layout, norm, in.grad, in.x, in.partials);
    });
    launch("batch_norm_finish_sums", batch_norm_finish_sums_kernel<A>, finish_blocks(s), dim3(kFinishChannels, kFinishRows), kFinishBytes,
           device, s, grid.layout, norm, in.partials, in.sums);
  });
}

template <typename scalar_t>
void launch_grad_input(Cuda device, const Shape& s, const Norm<acc_t<scalar_t>>& norm, const scalar_t* grad, const scalar_t* x,
                       const acc_t<scalar_t>* sums, double factor, scalar_t* grad_x) {
  specialize<scalar_t>(s, ef::is_vec_aligned(grad, x, grad_x, sums) && is_vec_aligned(norm), [&]<bool kPixels, int kVec>(const Grid& grid) {
    dispatch_activation(int64_t(norm.activation), [&]<Activation kActivation>() {
      launch("batch_norm_act_grad_input", batch_norm_act_grad_input_kernel<kPixels, kVec, kActivation, scalar_t>, grid.blocks, kThreads, 0,
             device, s, grid.layout, norm, grad, x, sums, factor, grad_x);
    });
  });
}

template <typename scalar_t>
void launch_train_backward(Cuda device, const Shape& s, const Norm<acc_t<scalar_t>>& norm, const Gradients<scalar_t>& in,
                           scalar_t* grad_x) {
  launch_sums(device, s, norm, in);
  launch_grad_input(device, s, norm, in.grad, in.x, in.sums, 1.0 / double(s.values()), grad_x);
}

#define EF_DEFINE(T)                                                                                                              \
  template void launch_stats<T>(Cuda, const Shape&, const T*, acc_t<T>*, const Statistics<acc_t<T>>&);                            \
  template void launch_forward<T>(Cuda, const Shape&, const Norm<acc_t<T>>&, const T*, T*);                                       \
  template void launch_train<T>(Cuda, const Shape&, const Norm<acc_t<T>>&, const T*, acc_t<T>*, const Statistics<acc_t<T>>&, T*); \
  template void launch_sums<T>(Cuda, const Shape&, const Norm<acc_t<T>>&, const Gradients<T>&);                                   \
  template void launch_grad_input<T>(Cuda, const Shape&, const Norm<acc_t<T>>&, const T*, const T*, const acc_t<T>*, double, T*); \
  template void launch_train_backward<T>(Cuda, const Shape&, const Norm<acc_t<T>>&, const Gradients<T>&, T*);
EF_FOR_EACH_FLOATING(EF_DEFINE)
#undef EF_DEFINE
}  // namespace ef::batch_norm_act
