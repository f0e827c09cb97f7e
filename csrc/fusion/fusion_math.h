// Formulas of the weighted fusion: normalized weights and their chain rule, and which pixels a resampling reads. No memory, no torch.
//   out = act(sum_i v_i r_i)    r_i = input i resampled    v = normalized weights
//   fast     v_i = relu(w_i) / (sum_j relu(w_j) + eps)     dL/dw_i = [w_i > 0] (d_i - sum_j d_j v_j) / (sum_j relu(w_j) + eps)
//   softmax  v_i = exp(w_i) / sum_j exp(w_j)               dL/dw_i = v_i (d_i - sum_j d_j v_j)         with d_i = dL/dv_i
//   sum      v_i = 1
#pragma once
#include "../common/choices.h"
#include "../common/math.h"

namespace ef::fusion {
// What the weights are normalized by: v_i = weight(w, i).
template <typename A>
struct Normalizer {
  FusionMethod method;
  A highest = 0, divisor = 1;

  EF_HD Normalizer(const A* w, int count, FusionMethod method_, A eps) : method(method_) {
    if (method == FusionMethod::kSum) return;
    highest = w[0];
    for (int i = 1; i < count; ++i) highest = w[i] > highest ? w[i] : highest;
    A sum = 0;
    for (int i = 0; i < count; ++i) sum += raw(w[i]);
    divisor = method == FusionMethod::kSoftmax ? sum : sum + eps;
  }
  EF_HD A weight(const A* w, int i) const { return method == FusionMethod::kSum ? A(1) : raw(w[i]) / divisor; }

 private:
  EF_HD A raw(A w) const { return method == FusionMethod::kSoftmax ? exp_of(w - highest) : (w < A(0) ? A(0) : w); }
};

template <typename A>
struct NormalizedWeights {
  A v[kMaxFusionInputs];
};

template <typename A>
EF_HD NormalizedWeights<A> normalized_weights(const A* w, int count, FusionMethod method, A eps) {
  const Normalizer<A> normalizer(w, count, method, eps);
  NormalizedWeights<A> result;
  for (int i = 0; i < kMaxFusionInputs; ++i) result.v[i] = i < count ? normalizer.weight(w, i) : A(0);
  return result;
}

// grad_w[i] from grad_v[i], in place of it; grad has kMaxFusionInputs elements, `count` of them in use.
template <typename A>
EF_HD void weight_gradients(const A* w, int count, FusionMethod method, A eps, A* grad) {
  if (method == FusionMethod::kSum) return;
  const Normalizer<A> normalizer(w, count, method, eps);
  A mean = 0;
  for (int i = 0; i < kMaxFusionInputs; ++i) mean += i < count ? grad[i] * normalizer.weight(w, i) : A(0);
  for (int i = 0; i < kMaxFusionInputs; ++i) {
    if (i >= count) continue;
    const A centered = grad[i] - mean;
    grad[i] = method == FusionMethod::kSoftmax ? normalizer.weight(w, i) * centered : (w[i] <= A(0) ? A(0) : centered / normalizer.divisor);
  }
}

// Nearest: output i reads input floor(i in / out), so input j is read by the outputs [first_child(j), first_child(j + 1)). A pyramid
// doubles, which needs no division.
EF_HD int64_t nearest_source(int64_t i, int64_t n_in, int64_t n_out) {
  if (n_in == n_out) return i;
  return 2 * n_in == n_out ? i >> 1 : quotient(i * n_in, n_out);
}
EF_HD int64_t first_child(int64_t j, int64_t n_in, int64_t n_out) { return n_in == n_out ? j : quotient(j * n_out + n_in - 1, n_in); }

// Max pooling of kernel 3 and stride 2: window o starts at 2 o - pool_before(size). Its taps are numbered 3 row + column; the first
// of the largest inside the input counts, and NaN counts as larger than anything, as in PyTorch.
EF_HD int64_t pool_before(int64_t size) { return size & 1; }
template <typename A>
EF_HD bool is_new_maximum(A x, A highest) {
  return x > highest || x != x;
}
EF_HD int first_tap(bool first_row_is_padding, bool first_column_is_padding) {
  return (first_row_is_padding ? 3 : 0) + (first_column_is_padding ? 1 : 0);
}
}  // namespace ef::fusion
