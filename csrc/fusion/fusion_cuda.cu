#include <algorithm>
#include <optional>

#include "../common/platform.h"
#include "fusion.h"
#include "fusion_kernel.cuh"

namespace ef::fusion {
namespace {
constexpr int64_t kMaxBlocks = 132 * 8;  // fills the largest part; fixed, so that the weights' gradient has the same bits on every device

struct Grid {
  dim3 grid, block;
  int64_t blocks() const { return int64_t(grid.x) * grid.y; }
};
// A block is some columns by some rows; several blocks side by side where a row is long. All have as many rows, but for the last.
Grid grid_for(int64_t rows, int64_t columns) {
  int64_t width = 1;
  if (columns < kWarpSize) {
    while (width < columns) width *= 2;
  } else {
    width = ceil_div(ceil_div(columns, ceil_div(columns, kThreads)), kWarpSize) * kWarpSize;
  }
  const int64_t height = kThreads / width, side_by_side = std::min<int64_t>(ceil_div(columns, width), kMaxBlocks);
  const int64_t down = ceil_div(rows, height), rounds = ceil_div(down, std::max<int64_t>(1, kMaxBlocks / side_by_side));
  return {dim3(unsigned(ceil_div(down, rounds)), unsigned(side_by_side)), dim3(unsigned(width), unsigned(height))};
}

// Without resampling the maps are one row of vectors, whatever their layout; cut to vectors if that is even.
template <typename scalar_t>
Problem<scalar_t> flattened(Problem<scalar_t> p) {
  constexpr int kVec = kVecSize<scalar_t>;
  const int64_t elements = p.n * p.h * p.w * p.c;
  const auto is_plain = [](const Input<scalar_t>& in) { return in.resample == Resample::kNone; };
  if (elements % kVec != 0 || !std::all_of(p.inputs, p.inputs + p.count, is_plain)) return p;
  p.n = elements / kVec;
  p.h = p.w = 1;
  p.c = kVec;
  for (int i = 0; i < p.count; ++i) p.inputs[i].h = p.inputs[i].w = 1;
  return p;
}

// Whether channels and addresses allow vectors.
template <typename scalar_t>
bool has_vectors(const Problem<scalar_t>& p, const Pooled<scalar_t>& kept, const Backward<scalar_t>& work, const void* out) {
  bool aligned = p.c % kVecSize<scalar_t> == 0 && is_vec_aligned(out, work.grad, work.grad_sum);
  for (int i = 0; i < p.count; ++i) {
    aligned = aligned && is_vec_aligned(p.inputs[i].x, kept.maxima[i], kept.taps[i], work.grad_inputs[i], work.unpools[i].taps,
                                        work.unpools[i].grad_input);
  }
  return aligned;
}

// The last input's resampling where fusion_kernel.cuh has a kernel for the node. Float64, which only gradient checks use, has none.
template <typename scalar_t>
std::optional<Resample> node_of(const Problem<scalar_t>& p, bool vectors) {
  for (int i = 0; i + 1 < p.count; ++i)
    if (p.inputs[i].resample != Resample::kNone) return {};
  const Input<scalar_t>& last = p.inputs[p.count - 1];
  const bool is_doubled = p.h == 2 * last.h && p.w == 2 * last.w;
  const bool is_made = last.resample == Resample::kNearest ? p.count == 2 && is_doubled : p.count <= 3 && vectors;
  return is_made && kVecSize<scalar_t> > 1 ? std::optional(last.resample) : std::nullopt;
}
template <typename scalar_t>
Grid node_grid(const Problem<scalar_t>& p, Resample last, bool vectors) {
  const int64_t side = last == Resample::kNearest ? 2 : 1;
  return grid_for(p.n * p.h / side, p.w / side * (p.c / (vectors ? kVecSize<scalar_t> : 1)));
}
template <typename scalar_t>
Grid backward_grid(const Problem<scalar_t>& p, bool vectors) {
  if (const auto last = node_of(p, vectors)) return node_grid(p, *last, vectors);
  const Parents parents = Parents::of(p);
  return grid_for(p.n * parents.h, parents.w * (p.c / (vectors ? kVecSize<scalar_t> : 1)));
}

// Calls f.template operator()<values of a vector>().
template <typename scalar_t, class F>
void dispatch_vec(bool vectors, F&& f) {
  vectors ? f.template operator()<kVecSize<scalar_t>>() : f.template operator()<1>();
}
// Calls f.template operator()<number of inputs, the last one's resampling, values of a vector>() for a node that node_of names.
template <typename scalar_t, class F>
void dispatch_node(const Problem<scalar_t>& p, Resample last, bool vectors, F&& f) {
  constexpr int kVec = kVecSize<scalar_t>;
  const auto of_count = [&]<Resample kLast>() {
    p.count == 2 ? f.template operator()<2, kLast, kVec>() : f.template operator()<3, kLast, kVec>();
  };
  if (last == Resample::kMaxPool) return of_count.template operator()<Resample::kMaxPool>();
  if (last == Resample::kNone) return of_count.template operator()<Resample::kNone>();
  vectors ? f.template operator()<2, Resample::kNearest, kVec>() : f.template operator()<2, Resample::kNearest, 1>();
}
}  // namespace

// Enough for vectors and for single values.
template <typename scalar_t>
int64_t partial_count(Cuda, const Problem<scalar_t>& problem) {
  const Problem<scalar_t> p = flattened(problem);
  return std::max(backward_grid(p, false).blocks(), p.c % kVecSize<scalar_t> == 0 ? backward_grid(p, true).blocks() : 0);
}

template <typename scalar_t>
void launch_forward(Cuda device, const Problem<scalar_t>& problem, const Pooled<scalar_t>& pooled, scalar_t* out) {
  const Problem<scalar_t> p = flattened(problem);
  const bool vectors = has_vectors(p, pooled, Backward<scalar_t>{}, out);
  if constexpr (kVecSize<scalar_t> > 1) {
    if (const auto last = node_of(p, vectors)) {
      const Grid grid = node_grid(p, *last, vectors);
      const bool keeps = pooled.taps[p.count - 1] != nullptr;
      return dispatch_node(p, *last, vectors, [&]<int kCount, Resample kLast, int kVec>() {
        auto kernel = fusion_kernel<kCount, kLast, false, kVec, scalar_t>;
        if constexpr (kLast == Resample::kMaxPool)
          if (keeps) kernel = fusion_kernel<kCount, kLast, true, kVec, scalar_t>;
        launch("fusion", kernel, grid.grid, grid.block, 0, device, p, pooled, out);
      });
    }
  }
  dispatch_vec<scalar_t>(vectors, [&]<int kVec>() {
    const Grid grid = grid_for(p.n * p.h, p.w * (p.c / kVec));
    launch("fusion", fusion_any_kernel<kVec, scalar_t>, grid.grid, grid.block, 0, device, p, pooled, out);
  });
}

namespace {
// The first pass.
template <typename scalar_t>
void launch_sum_backward(Cuda device, const Problem<scalar_t>& p, const Backward<scalar_t>& work, const Grid& grid, bool vectors) {
  const size_t sum_bytes = kMaxFusionInputs * kWarpSize * sizeof(acc_t<scalar_t>);
  if constexpr (kVecSize<scalar_t> > 1) {
    if (const auto last = node_of(p, vectors)) {
      return dispatch_node(p, *last, vectors, [&]<int kCount, Resample kLast, int kVec>() {
        if constexpr (kLast != Resample::kMaxPool) {  // whose maxima are an input without resampling
          launch("fusion_backward", fusion_backward_kernel<kCount, kLast, kVec, scalar_t>, grid.grid, grid.block, sum_bytes, device, p,
                 work);
        }
      });
    }
  }
  dispatch_vec<scalar_t>(vectors, [&]<int kVec>() {
    launch("fusion_backward", fusion_any_backward_kernel<kVec, scalar_t>, grid.grid, grid.block, sum_bytes, device, p, Parents::of(p),
           work);
  });
}
}  // namespace

template <typename scalar_t>
void launch_backward(Cuda device, const Problem<scalar_t>& p, const Backward<scalar_t>& work) {
  using A = acc_t<scalar_t>;
  const Parents parents = Parents::of(p);
  const scalar_t* grad_sum = work.grad_sum ? work.grad_sum : work.grad;
  const Problem<scalar_t> flat = flattened(p);
  const bool flat_vectors = has_vectors(flat, {}, work, nullptr);
  const Grid grid = backward_grid(flat, flat_vectors);
  launch_sum_backward(device, flat, work, grid, flat_vectors);
  if (work.grad_weights) {
    const size_t sum_bytes = kMaxFusionInputs * kWarpSize * sizeof(A);
    launch("fusion_weights", fusion_weights_kernel<A>, 1, kThreads, sum_bytes, device, work.partials, grid.blocks(), p.weights, p.count,
           p.method, p.eps, work.grad_weights);
  }
  dispatch_vec<scalar_t>(has_vectors(p, {}, work, nullptr), [&]<int kVec>() {
    for (int i = 0; i < p.count; ++i) {
      const Input<scalar_t>& in = p.inputs[i];
      if (work.grad_inputs[i] && in.resample == Resample::kNearest && !parents.own(in)) {
        const Grid pixels = grid_for(p.n * in.h, in.w * (p.c / kVec));
        launch("fusion_nearest_backward", fusion_nearest_backward_kernel<kVec, scalar_t>, pixels.grid, pixels.block, 0, device, p, i,
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
