// What the Tensor boundary may call; raw pointers only. Logits are dense: `rows` rows of `classes`, in memory order. A target is either
// a label per row (int64: a class, -1 background, -2 ignored; anything else counts as background) or a value per logit.
#pragma once
#include <cstdint>

#include "../common/platform.h"

namespace ef::focal_loss {
struct Options {
  double alpha, gamma, smoothing;
};
template <typename scalar_t>
struct Problem {
  const scalar_t* logits;               // [rows, classes]
  const int64_t* labels;                // [rows], or null
  const scalar_t* soft;                 // [rows, classes], or null
  const acc_t<scalar_t>* class_weight;  // [classes], or null for 1
  int64_t rows, classes;
  Options options;
};

// The weight of the class `column`, counted on over the rows behind; 1 where classes have none.
template <typename A>
EF_HD A class_weight_at(const A* class_weight, int64_t column, int64_t classes) {  // [classes], or null
  if (!class_weight) return A(1);
  while (column >= classes) column -= classes;
  return class_weight[column];
}

// loss[i]: [rows, classes]
template <typename scalar_t>
void launch_forward(Cpu, const Problem<scalar_t>& problem, scalar_t* loss);
template <typename scalar_t>
void launch_forward(Cuda, const Problem<scalar_t>& problem, scalar_t* loss);

// sum[0]: the sum of all losses, through partials[partial_count(rows, classes)], in a fixed order.
template <typename scalar_t>
void launch_sum(Cpu, const Problem<scalar_t>& problem, acc_t<scalar_t>* partials, acc_t<scalar_t>* sum);
template <typename scalar_t>
void launch_sum(Cuda, const Problem<scalar_t>& problem, acc_t<scalar_t>* partials, acc_t<scalar_t>* sum);
int64_t partial_count(Cpu, int64_t rows, int64_t classes);
int64_t partial_count(Cuda, int64_t rows, int64_t classes);

// grad_logits = d loss / d logits times grad_loss [rows, classes], or times the one value grad_sum[0].
template <typename scalar_t>
void launch_backward(Cpu, const Problem<scalar_t>& problem, const scalar_t* grad_loss, const acc_t<scalar_t>* grad_sum,
                     scalar_t* grad_logits);
template <typename scalar_t>
void launch_backward(Cuda, const Problem<scalar_t>& problem, const scalar_t* grad_loss, const acc_t<scalar_t>* grad_sum,
                     scalar_t* grad_logits);
}  // namespace ef::focal_loss
