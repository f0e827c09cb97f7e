// A vector of neighboring logits of dense [rows, classes]: where it lies, what the labels say about it, and the short path through one
// that is all background. Most vectors are, so that most warps run the short path alone; one whose threads diverge pays for both.
#pragma once
#include "../common/vec.cuh"
#include "focal_loss_math.h"

namespace ef::focal_loss {
// How many rows and columns a number of logits is.
struct Stride {
  int64_t rows;
  int columns;
  __device__ static Stride of(int64_t logits, int64_t classes) {
    const int64_t rows = quotient(logits, classes);
    return {rows, int(logits - rows * classes)};
  }
};

// A logit's place: its row's label and its column. Stepped by additions: a division costs as much as a logit.
template <typename label_t, typename column_t>
struct Place {
  const label_t* label;
  column_t column;
  __device__ static Place of(const label_t* labels, int64_t i, int64_t classes) {
    const int64_t row = quotient(i, classes);
    return {labels + row, column_t(i - row * classes)};
  }
  __device__ void advance(const Stride& by, int classes) {
    label += by.rows;
    column += by.columns;
    if (column < classes) return;
    column -= classes;
    ++label;
  }
};
inline constexpr int64_t kMaxClasses = int64_t(1) << 30;  // fewer than these have int for a column

// Whether none of the logits from a place on is positive or ignored. Two labels are looked at: false where more rows may be in a vector.
template <int kVec, typename label_t>
__device__ bool all_background(const Place<label_t, int>& at, int classes) {
  const bool labeled = (at.label[0] & at.label[at.column + kVec > classes ? 1 : 0]) != -1;
  return !labeled & (classes >= kVec);
}

// Which logits from a place on are positive, and which ignored: a bit for each.
struct Marks {
  uint32_t positive = 0, ignored = 0;
};
template <int kVec, typename label_t, typename column_t>
__device__ Marks marks_of(const Place<label_t, column_t>& at, int64_t classes) {
  Marks marks;
  const label_t* row = at.label;
  for (int64_t begin = 0, column = at.column; begin < kVec; column = 0, ++row) {
    const int64_t label = *row, end = begin + classes - column, last = end < kVec ? end : kVec;
    if (label >= column && label - column < last - begin) marks.positive |= 1u << (begin + label - column);
    if (label == -2) marks.ignored |= (1u << last) - (1u << begin);
    begin = last;
  }
  return marks;
}

// A background vector's sum of losses, without alpha, and its gradient.
template <Modulator kModulator, int kVec, typename scalar_t>
__device__ acc_t<scalar_t> background(const Vec<scalar_t, kVec>& x, const Parameters<acc_t<scalar_t>>& p,
                                      const Slope<acc_t<scalar_t>>& slope, Vec<scalar_t, kVec>& grad) {
  acc_t<scalar_t> sum = 0;
#pragma unroll
  for (int k = 0; k < kVec; ++k) {
    const auto f = hard_loss_and_grad<kModulator>(acc_t<scalar_t>(x.v[k]), p, slope);
    sum += f.loss;
    grad.v[k] = scalar_t(f.grad);
  }
  return sum;
}
}  // namespace ef::focal_loss
