// Loops of the CPU kernels over few elements, which stay in the first-level cache; each is compiled per instruction set.
#pragma once
#include "../common/vector.h"
#include "fusion.h"

namespace ef::fusion {
template <typename scalar_t, typename out_t>
EF_CPU_CLONES void convert(const scalar_t* __restrict x, int64_t m, out_t* __restrict out) {
  for (int64_t j = 0; j < m; ++j) out[j] = out_t(x[j]);
}

// out[j, :] = x[columns[j], :]
template <typename scalar_t>
EF_CPU_CLONES void nearest_row(const scalar_t* __restrict x, const int32_t* __restrict columns, int64_t m, int64_t c,
                               acc_t<scalar_t>* __restrict out) {
  using A = acc_t<scalar_t>;
  if (c == 1) {
    for (int64_t j = 0; j < m; ++j) out[j] = A(x[columns[j]]);
    return;
  }
  for (int64_t j = 0; j < m; ++j)
    for (int64_t k = 0; k < c; ++k) out[j * c + k] = A(x[columns[j] * c + k]);
}
// The same of one channel where each of m columns has two children: shuffles instead of gathers.
template <typename scalar_t>
EF_CPU_CLONES void doubled_row(const scalar_t* __restrict x, int64_t m, acc_t<scalar_t>* __restrict out) {
  for (int64_t j = 0; j < m; ++j) out[2 * j] = out[2 * j + 1] = acc_t<scalar_t>(x[j]);
}

template <int kCount, typename A>
EF_HD A weighted_sum(const A* const (&rows)[kMaxFusionInputs], const NormalizedWeights<A>& weights, int64_t j) {
  A total = weights.v[0] * rows[0][j];
#pragma GCC unroll 4
  for (int i = 1; i < kCount; ++i) total += weights.v[i] * rows[i][j];
  return total;
}
template <typename A>
struct Rows {
  const A* of[kMaxFusionInputs];  // the inputs in use, as large as the output
};

template <Activation kActivation, int kCount, typename scalar_t>
EF_CPU_CLONES void fuse(const Rows<acc_t<scalar_t>> rows, const NormalizedWeights<acc_t<scalar_t>> weights, int64_t m,
                        scalar_t* __restrict out) {
#pragma GCC ivdep
  for (int64_t j = 0; j < m; ++j) out[j] = scalar_t(activate<kActivation>(weighted_sum<kCount>(rows.of, weights, j)));
}
// out = the gradient of the sum
template <Activation kActivation, int kCount, typename scalar_t>
EF_CPU_CLONES void unfuse(const Rows<acc_t<scalar_t>> rows, const NormalizedWeights<acc_t<scalar_t>> weights,
                          const scalar_t* __restrict grad, int64_t m, acc_t<scalar_t>* __restrict out) {
  using A = acc_t<scalar_t>;
#pragma GCC ivdep
  for (int64_t j = 0; j < m; ++j) out[j] = activate_backward<kActivation>(A(grad[j]), weighted_sum<kCount>(rows.of, weights, j));
}

// totals[i] += the sum of rows[i] * grad; all inputs in one loop, as each sum waits for its own additions.
template <int kCount, typename A>
EF_CPU_CLONES void add_products(const Rows<A> rows, const A* __restrict grad, int64_t m, A* __restrict totals) {
  using V = typename VectorOf<A>::type;
  V sums[kCount] = {};
  int64_t j = 0;
  for (; j + kLanes<V, A> <= m; j += kLanes<V, A>) {
    const V factor = load(grad + j);
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) sums[i] += load(rows.of[i] + j) * factor;
  }
  for (int i = 0; i < kCount; ++i) {
    A total = 0;
    for (int lane = 0; lane < kLanes<V, A>; ++lane) total += sums[i][lane];
    for (int64_t k = j; k < m; ++k) total += rows.of[i][k] * grad[k];
    totals[i] += total;
  }
}

template <typename A, typename out_t>
EF_CPU_CLONES void scale(const A* __restrict x, A factor, int64_t m, out_t* __restrict out) {
  for (int64_t j = 0; j < m; ++j) out[j] = out_t(factor * x[j]);
}

// parents[columns[j], :] += children[j, :]
template <typename T, typename A>
EF_CPU_CLONES void add_to_parents(const T* __restrict children, const int32_t* __restrict columns, int64_t m, int64_t c,
                                  A* __restrict parents) {
  if (c == 1) {
    for (int64_t j = 0; j < m; ++j) parents[columns[j]] += A(children[j]);
    return;
  }
  for (int64_t j = 0; j < m; ++j)
    for (int64_t k = 0; k < c; ++k) parents[columns[j] * c + k] += A(children[j * c + k]);
}
template <typename T, typename A>
EF_CPU_CLONES void add_pairs_to_parents(const T* __restrict children, int64_t m, A* __restrict parents) {
  for (int64_t j = 0; j < m; ++j) parents[j] += A(children[2 * j]) + A(children[2 * j + 1]);
}

}  // namespace ef::fusion
