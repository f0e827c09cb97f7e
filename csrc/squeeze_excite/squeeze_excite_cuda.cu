#include <algorithm>

#include "../common/platform.h"
#include "squeeze_excite.h"
#include "squeeze_excite_gates_kernel.cuh"
#include "squeeze_excite_kernel.cuh"

namespace ef::squeeze_excite {
namespace {
constexpr int64_t kPlaneChunk = 2048;  // 16 vectors of float a lane: enough warps for a batch of few large planes
constexpr int64_t kImageChunk = 8192;  // of the at most kBlockChannels channels of a block
constexpr int64_t kBlockChannels = 128;

struct Grid {
  dim3 blocks;
  Layout layout;
};
int64_t chunk_size(const Shape& s) { return s.channels == 1 ? kPlaneChunk : ceil_div(kImageChunk, std::min(s.channels, kBlockChannels)); }
Grid grid_for(const Shape& s, int vec) {
  const int64_t size = chunk_size(s), chunks = ceil_div(s.pixels, size), all = s.rows * chunks;
  if (s.channels == 1) return {dim3(unsigned(ceil_div(all, kThreads / kWarpSize))), {0, 0, size, chunks}};
  const int64_t vectors = s.channels / vec, side_by_side = ceil_div(vectors, kWarpSize), columns = ceil_div(vectors, side_by_side);
  return {dim3(unsigned(all), unsigned(side_by_side)), {columns, kThreads / columns, size, chunks}};
}

// Calls f.template operator()<kPixels, kVec>(grid) for a shape whose buffers are all aligned, or not.
template <typename scalar_t, class F>
void specialize(const Shape& s, bool aligned, F&& f) {
  constexpr int kVec = kVecSize<scalar_t>;
  const bool pixels = s.channels > 1, vectors = aligned && (pixels ? s.channels : s.pixels) % kVec == 0;
  const Grid grid = grid_for(s, vectors ? kVec : 1);
  if (pixels) {
    vectors ? f.template operator()<true, kVec>(grid) : f.template operator()<true, 1>(grid);
  } else {
    vectors ? f.template operator()<false, kVec>(grid) : f.template operator()<false, 1>(grid);
  }
}
template <bool kPixels, int kVec, bool kProducts, typename scalar_t>
void reduce(Cuda device, const Shape& s, const Grid& grid, const Reduction<scalar_t>& in) {
  using A = acc_t<scalar_t>;
  const Layout& l = grid.layout;
  const size_t bytes = kPixels ? row_sum_bytes<kVec, 1, A>(l.height, l.columns) : 0;
  launch("squeeze_excite_reduce", squeeze_excite_reduce_kernel<kPixels, kVec, kProducts, scalar_t>, grid.blocks, kThreads, bytes, device, s,
         l, in.x, in.grad, in.partials);
}
}  // namespace

int64_t chunk_count(Cuda, const Shape& s) { return ceil_div(s.pixels, chunk_size(s)); }

template <typename scalar_t>
void launch_reduce(Cuda device, const Shape& s, const Reduction<scalar_t>& in) {
  using A = acc_t<scalar_t>;
  specialize<scalar_t>(s, is_vec_aligned(in.x, in.grad), [&]<bool kPixels, int kVec>(const Grid& grid) {
    in.grad ? reduce<kPixels, kVec, true>(device, s, grid, in) : reduce<kPixels, kVec, false>(device, s, grid, in);
  });
  launch("squeeze_excite_finish", squeeze_excite_finish_kernel<A>, dim3(unsigned(ceil_div(s.gates(), kWarpSize))),
         dim3(kWarpSize, kFinishRows), kWarpSize * kFinishRows * sizeof(double), device, s, chunk_count(device, s), in.partials, in.gate,
         in.result);
}

template <typename scalar_t>
void launch_scale(Cuda device, const Shape& s, const scalar_t* x, const acc_t<scalar_t>* gate, const acc_t<scalar_t>* grad_mean,
                  scalar_t* y) {
  const auto factor = acc_t<scalar_t>(1.0 / double(s.pixels));
  specialize<scalar_t>(s, is_vec_aligned(x, y, gate, grad_mean), [&]<bool kPixels, int kVec>(const Grid& grid) {
    const auto run = [&](auto kernel) {
      launch("squeeze_excite_scale", kernel, grid.blocks, kThreads, 0, device, s, grid.layout, x, gate, grad_mean, factor, y);
    };
    grad_mean ? run(squeeze_excite_scale_kernel<kPixels, kVec, true, scalar_t>)
              : run(squeeze_excite_scale_kernel<kPixels, kVec, false, scalar_t>);
  });
}

namespace {
template <typename A>
void multiply(Cuda device, int64_t images, int64_t rows, int64_t count, const A* in, const A* weight, int64_t row, int64_t step,
              const A* bias, A* out) {
  launch("squeeze_excite_multiply", squeeze_excite_multiply_kernel<A>, unsigned(ceil_div(images * rows, kGateThreads)), kGateThreads, 0,
         device, images, rows, count, in, weight, row, step, bias, out);
}
}  // namespace

template <typename A>
void launch_gates(Cuda device, const Weights<A>& w, Activation activation, const Gates<A>& g) {
  dispatch_activation(int64_t(activation), [&]<Activation kActivation>() {
    launch("squeeze_excite_squeeze", squeeze_excite_squeeze_kernel<kActivation, A>, unsigned(ceil_div(g.images * w.squeezed, kGateWarps)),
           kGateThreads, 0, device, w, g);
  });
  multiply(device, g.images, w.channels, w.squeezed, g.squeezed, w.expand, w.squeezed, 1, w.expand_bias, g.gate);
}

template <typename A>
void launch_gates_backward(Cuda device, const Weights<A>& w, Activation activation, const Gates<A>& g, const GateGradients<A>& grad) {
  const auto grad_weight = [&](int64_t rows, int64_t columns, const A* left, const A* right, A* out, A* bias) {
    if (!out && !bias) return;
    launch("squeeze_excite_grad_weight", squeeze_excite_grad_weight_kernel<A>, unsigned(ceil_div(rows * columns, kGateThreads)),
           kGateThreads, 0, device, g.images, rows, columns, left, right, out, bias);
  };
  grad_weight(w.channels, w.squeezed, grad.gate, g.squeezed, grad.expand, grad.expand_bias);
  if (!grad.reduced) return;
  dispatch_activation(int64_t(activation), [&]<Activation kActivation>() {
    launch("squeeze_excite_grad_reduced", squeeze_excite_grad_reduced_kernel<kActivation, A>,
           dim3(unsigned(g.images), unsigned(ceil_div(w.squeezed, kWarpSize))), dim3(kWarpSize, kGateWarps), kGateThreads * sizeof(A),
           device, w, g, grad);
  });
  grad_weight(w.squeezed, w.channels, grad.reduced, g.mean, grad.reduce, grad.reduce_bias);
  if (!grad.mean) return;
  multiply(device, g.images, w.channels, w.squeezed, grad.reduced, w.reduce, 1, w.channels, static_cast<const A*>(nullptr), grad.mean);
}

#define EF_DEFINE(T)                                                       \
  template void launch_reduce<T>(Cuda, const Shape&, const Reduction<T>&); \
  template void launch_scale<T>(Cuda, const Shape&, const T*, const acc_t<T>*, const acc_t<T>*, T*);
EF_FOR_EACH_FLOATING(EF_DEFINE)
#undef EF_DEFINE
template void launch_gates<float>(Cuda, const Weights<float>&, Activation, const Gates<float>&);
template void launch_gates<double>(Cuda, const Weights<double>&, Activation, const Gates<double>&);
template void launch_gates_backward<float>(Cuda, const Weights<float>&, Activation, const Gates<float>&, const GateGradients<float>&);
template void launch_gates_backward<double>(Cuda, const Weights<double>&, Activation, const Gates<double>&, const GateGradients<double>&);
}  // namespace ef::squeeze_excite
