// A vector of neighbouring logits of dense [rows, classes]: where it lies, what the labels say about it, and the short way through one
// that is all background. Nearly all are, so a warp seldom takes the long way; of two formulas side by side it would pay for both.
#pragma once
#include "../common/vec.cuh"
#include "focal_loss_math.h"

namespace ef::focal_loss {
// A place in memory order, stepped by additions: a division costs as much as a logit. Classes are fewer than kMostClasses.
inline constexpr int64_t kMostClasses = int64_t(1) << 30;
template <typename row_t>
struct Place {
  row_t row;
  int column;
  __device__ void advance(const Place& by, int classes) {
    row += by.row;
    column += by.column;
    if (column < classes) return;
    column -= classes;
    ++row;
  }
};
template <typename row_t>
__device__ Place<row_t> place_of(int64_t i, int64_t classes) {
  const int64_t row = quotient(i, classes);
  return {row_t(row), int(i - row * classes)};
}

// Whether none of the logits from a place on is positive or ignored. Unsure of a vector that may have more than two rows, it says no.
template <int kVec, typename label_t, typename row_t>
__device__ bool all_background(const label_t* labels, const Place<row_t>& at, int classes) {
  const bool labelled = (labels[at.row] & labels[at.row + (at.column + kVec > classes ? 1 : 0)]) != -1;
  return !labelled & (classes >= kVec);
}

// Which logits from a place on are positive, and which ignored: a bit for each.
struct Marks {
  uint32_t positive = 0, ignored = 0;
};
template <int kVec, typename label_t>
__device__ Marks marks_of(const label_t* labels, int64_t row, int64_t column, int64_t classes) {
  Marks marks;
  for (int begin = 0; begin < kVec; column = 0, ++row) {
    const int64_t label = labels[row], end = begin + classes - column, place = begin + label - column;
    const int last = end < kVec ? int(end) : kVec;
    if (label >= 0 && place >= begin && place < last) marks.positive |= 1u << place;
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
