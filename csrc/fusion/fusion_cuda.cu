#include <algorithm>

#include "../common/platform.h"
#include "fusion.h"
#include "fusion_kernel.cuh"

namespace ef::fusion {
namespace {
constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 132 * 16;  // fills the largest part; fixed, so that the weights' gradient has the same bits on every device

struct Grid {
  dim3 grid, block;
  int64_t blocks() const { return int64_t(grid.x) * grid.y; }
};
// A block is some columns by some rows; several blocks side by side where a row is long.
Grid grid_for(int64_t rows, int64_t columns) {
  int64_t width = 1;
  if (columns < kWarpSize) {
    while (width < columns) width *= 2;
  } else {
    width = ceil_div(ceil_div(columns, ceil_div(columns, kThreads)), kWarpSize) * kWarpSize;
  }
  const int64_t height = kThreads / width, side_by_side = std::min<int64_t>(ceil_div(columns, width), kMaxBlocks);
  const int64_t down = std::min(ceil_div(rows, height), std::max<int64_t>(1, kMaxBlocks / side_by_side));
  return {dim3(unsigned(down), unsigned(side_by_side)), dim3(unsigned(width), unsigned(height))};
}
template <typename scalar_t>
Grid cell_grid(const Problem<scalar_t>& p, int vec) {
  const Cells cells = Cells::of(p);
  return grid_for(p.n * cells.h, cells.w * (p.c / vec));
}

// Calls f.template operator()<kVec>() for the channel vectors that channels and addresses allow.
template <typename scalar_t, class F>
void dispatch_vec(const Problem<scalar_t>& p, const Pooled<scalar_t>& kept, const Backward<scalar_t>& work, const void* out, F&& f) {
  constexpr int kVec = kVecSize<scalar_t>;
  bool aligned = p.c % kVec == 0 && is_vec_aligned(out, work.grad, work.grad_sum);
  for (int i = 0; i < p.count; ++i) {
    aligned = aligned && is_vec_aligned(p.inputs[i].x, kept.maxima[i], kept.taps[i], work.grad_inputs[i], work.unpools[i].taps,
                                        work.unpools[i].grad_input);
  }
  aligned ? f.template operator()<kVec>() : f.template operator()<1>();
}
template <class F>
void dispatch_count(int count, F&& f) {
  if (count == 2) return f.template operator()<2>();
  if (count == 3) return f.template operator()<3>();
  f.template operator()<4>();
}
}  // namespace

// Enough for both vector sizes.
template <typename scalar_t>
int64_t partial_count(Cuda, const Problem<scalar_t>& p) {
  constexpr int kVec = kVecSize<scalar_t>;
  return std::max(cell_grid(p, 1).blocks(), p.c % kVec == 0 ? cell_grid(p, kVec).blocks() : 0);
}

template <typename scalar_t>
void launch_forward(Cuda device, const Problem<scalar_t>& p, const Pooled<scalar_t>& pooled, scalar_t* out) {
  dispatch_vec(p, pooled, Backward<scalar_t>{}, out, [&]<int kVec>() {
    dispatch_count(p.count, [&]<int kCount>() {
      const Grid grid = grid_for(p.n * p.h, p.w * (p.c / kVec));
      launch("fusion", fusion_kernel<kCount, kVec, scalar_t>, grid.grid, grid.block, 0, device, p, pooled, out);
    });
  });
}

template <typename scalar_t>
void launch_backward(Cuda device, const Problem<scalar_t>& p, const Backward<scalar_t>& work) {
  using A = acc_t<scalar_t>;
  const Cells cells = Cells::of(p);
  const scalar_t* grad_sum = work.grad_sum ? work.grad_sum : work.grad;
  const size_t sum_bytes = kMaxFusionInputs * kWarpSize * sizeof(A);
  dispatch_vec(p, Pooled<scalar_t>{}, work, nullptr, [&]<int kVec>() {
    const Grid grid = cell_grid(p, kVec);
    dispatch_count(p.count, [&]<int kCount>() {
      launch("fusion_backward", fusion_backward_kernel<kCount, kVec, scalar_t>, grid.grid, grid.block, sum_bytes, device, p, cells, work);
    });
    if (work.grad_weights) {
      launch("fusion_weights", fusion_weights_kernel<A>, 1, kThreads, sum_bytes, device, work.partials, grid.blocks(), p.weights, p.count,
             p.method, p.eps, work.grad_weights);
    }
    for (int i = 0; i < p.count; ++i) {
      const Input<scalar_t>& in = p.inputs[i];
      if (work.grad_inputs[i] && in.resample == Resample::kNearest && !cells.own(in)) {
        const Grid parents = grid_for(p.n * in.h, in.w * (p.c / kVec));
        launch("fusion_nearest_backward", fusion_nearest_backward_kernel<kVec, scalar_t>, parents.grid, parents.block, 0, device, p, i,
               grad_sum, work.grad_inputs[i]);
      }
      if (const Unpool<scalar_t>& unpool = work.unpools[i]; unpool.grad_input) {
        const Grid windows = grid_for(p.n * p.h, p.w * (p.c / kVec));
        launch("fusion_max_pool_backward", fusion_max_pool_backward_kernel<kVec, scalar_t>, windows.grid, windows.block, 0, device, p, i,
               grad_sum, unpool.taps, unpool.h, unpool.w, unpool.grad_input);
      }
    }
  });
}

#define EF_DEFINE(scalar_t)                                                                                   \
  template void launch_forward<scalar_t>(Cuda, const Problem<scalar_t>&, const Pooled<scalar_t>&, scalar_t*); \
  template void launch_backward<scalar_t>(Cuda, const Problem<scalar_t>&, const Backward<scalar_t>&);         \
  template int64_t partial_count<scalar_t>(Cuda, const Problem<scalar_t>&);
EF_FOR_EACH_FLOATING(EF_DEFINE)
#undef EF_DEFINE
}  // namespace ef::fusion
