// The small matrix products of squeeze-and-excite on the CPU. Every element is one sum in a fixed order, whatever the number of threads.
#pragma once
#include <algorithm>

#include "../common/parallel.h"
#include "../common/vector.h"
#include "squeeze_excite.h"

namespace ef::squeeze_excite {
inline constexpr int64_t kThreadProducts = 1 << 15;  // that are worth a thread

// out[i] = sum of weight[i, j] x[j], and the bias; i < rows, j < size.
template <typename A>
EF_CPU_CLONES void multiply_row(const A* __restrict weight, const A* __restrict bias, const A* __restrict x, int64_t rows, int64_t size,
                                A* __restrict out) {
  for (int64_t i = 0; i < rows; ++i) {
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < size; ++j) sum += weight[i * size + j] * x[j];
    out[i] = bias ? sum + bias[i] : sum;
  }
}
// x [images, size] -> [images, rows]
template <typename A>
void multiply(const A* weight, const A* bias, const A* x, int64_t images, int64_t rows, int64_t size, A* out) {
  parallel_for(rows, std::max<int64_t>(1, kThreadProducts / (images * size)), [&](int64_t begin, int64_t end) {
    for (int64_t n = 0; n < images; ++n)
      multiply_row(weight + begin * size, bias ? bias + begin : nullptr, x + n * size, end - begin, size, out + n * rows + begin);
  });
}

// out[i, j] = sum over k of left[i row + k step] right[k, j]; j < size.
template <class Of, typename A>
EF_CPU_CLONES void combine_rows(Of left, int64_t row, int64_t step, const A* __restrict right, int64_t begin, int64_t end, int64_t count,
                                int64_t size, A* __restrict out) {
  for (int64_t i = begin; i < end; ++i) {
    A* __restrict sum = out + i * size;
    std::fill_n(sum, size, A(0));
    const auto factor = [&](int64_t k) { return left[i * row + k * step]; };
    int64_t k = 0;
    for (; k + 4 <= count; k += 4) {
      const A a = factor(k), b = factor(k + 1), c = factor(k + 2), d = factor(k + 3);
      const A* __restrict rows = right + k * size;
#pragma omp simd
      for (int64_t j = 0; j < size; ++j) sum[j] += (a * rows[j] + b * rows[size + j]) + (c * rows[2 * size + j] + d * rows[3 * size + j]);
    }
    for (; k < count; ++k) {
      const A a = factor(k);
#pragma omp simd
      for (int64_t j = 0; j < size; ++j) sum[j] += a * right[k * size + j];
    }
  }
}
template <class Of, typename A>
void combine(Of left, int64_t row, int64_t step, const A* right, int64_t rows, int64_t count, int64_t size, A* out) {
  if (!out) return;
  parallel_for(rows, std::max<int64_t>(1, kThreadProducts / (count * size)),
               [&](int64_t begin, int64_t end) { combine_rows(left, row, step, right, begin, end, count, size, out); });
}

template <typename A>
void launch_gates(Cpu, const Weights<A>& w, Activation activation, const Gates<A>& g) {
  multiply(w.reduce, w.reduce_bias, g.mean, g.images, w.squeezed, w.channels, g.reduced);
  dispatch_activation(int64_t(activation), [&]<Activation kActivation>() {
    for (int64_t i = 0; i < g.images * w.squeezed; ++i) g.squeezed[i] = activate<kActivation>(g.reduced[i]);
  });
  multiply(w.expand, w.expand_bias, g.squeezed, g.images, w.channels, w.squeezed, g.gate);
}

template <typename A>
void launch_gates_backward(Cpu, const Weights<A>& w, Activation activation, const Gates<A>& g, const GateGradients<A>& grad) {
  combine(grad.gate, 1, w.channels, g.squeezed, w.channels, g.images, w.squeezed, grad.expand);
  combine(Same<A>{1}, 0, 0, grad.gate, 1, g.images, w.channels, grad.expand_bias);
  combine(grad.gate, w.channels, 1, w.expand, g.images, w.channels, w.squeezed, grad.reduced);
  if (!grad.reduced) return;
  dispatch_activation(int64_t(activation), [&]<Activation kActivation>() {
    for (int64_t i = 0; i < g.images * w.squeezed; ++i) grad.reduced[i] = activate_backward<kActivation>(grad.reduced[i], g.reduced[i]);
  });
  combine(grad.reduced, 1, w.squeezed, g.mean, w.squeezed, g.images, w.channels, grad.reduce);
  combine(Same<A>{1}, 0, 0, grad.reduced, 1, g.images, w.squeezed, grad.reduce_bias);
  combine(grad.reduced, w.squeezed, 1, w.reduce, g.images, w.squeezed, w.channels, grad.mean);
}
}  // namespace ef::squeeze_excite
