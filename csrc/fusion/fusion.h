// What the Tensor boundary may call; raw pointers only. Every tensor is dense [n, h, w, c]: channels_last as it is, NCHW as n * c
// images of one channel. Only h and w differ between the inputs.
#pragma once
#include <cstdint>

#include "../common/math.h"
#include "../common/platform.h"
#include "fusion_math.h"

namespace ef::fusion {
template <typename scalar_t>
struct Input {
  const scalar_t* x;  // [n, h, w, c]
  int64_t h, w;
  Resample resample;
};

template <typename scalar_t>
struct Problem {
  Input<scalar_t> inputs[kMaxFusionInputs];
  int count;
  int64_t n, h, w, c;              // of the output
  const acc_t<scalar_t>* weights;  // [count], or null with FusionMethod::kSum
  FusionMethod method;
  acc_t<scalar_t> eps;
  Activation activation;
};

// What a forward keeps of its max_pool inputs, each [n, h, w, c]; null for the others and where nothing is kept.
template <typename scalar_t>
struct Pooled {
  scalar_t* maxima[kMaxFusionInputs];
  uint8_t* taps[kMaxFusionInputs];  // which tap of its window each maximum is
};

// out: [n, h, w, c]
template <typename scalar_t>
void launch_forward(Cpu, const Problem<scalar_t>& problem, const Pooled<scalar_t>& pooled, scalar_t* out);
template <typename scalar_t>
void launch_forward(Cuda, const Problem<scalar_t>& problem, const Pooled<scalar_t>& pooled, scalar_t* out);

// The backward runs over "parents": the pixels of the first nearest input, whose children divide the output among them; without one,
// the pixels of the output, each its own child.
struct Parents {
  int64_t h, w;
  template <typename scalar_t>
  static Parents of(const Problem<scalar_t>& problem) {
    for (int i = 0; i < problem.count; ++i)
      if (problem.inputs[i].resample == Resample::kNearest) return {problem.inputs[i].h, problem.inputs[i].w};
    return {problem.h, problem.w};
  }
  // A nearest input of the parents' size gets its gradient in the pass over the parents; any other from the stored grad_sum.
  template <typename scalar_t>
  EF_HD bool own(const Input<scalar_t>& input) const {
    return input.resample == Resample::kNearest && input.h == h && input.w == w;
  }
};

// Takes the gradient of kept maxima to the input [n, h, w, c] they were found in.
template <typename scalar_t>
struct Unpool {
  const uint8_t* taps;
  scalar_t* grad_input;  // null where not wanted
  int64_t h, w;
};

// The problem's max_pool inputs are replaced by their maxima, as inputs without resampling.
template <typename scalar_t>
struct Backward {
  const scalar_t* grad;                     // [n, h, w, c]
  scalar_t* grad_inputs[kMaxFusionInputs];  // like the inputs, null where not wanted and for maxima
  Unpool<scalar_t> unpools[kMaxFusionInputs];
  acc_t<scalar_t>* grad_weights;  // [count], or null
  scalar_t* grad_sum;             // workspace [n, h, w, c]: gradient of the sum before the activation; null where not needed
  acc_t<scalar_t>* partials;      // workspace [partial_count, count], null without grad_weights
};

template <typename scalar_t>
void launch_backward(Cpu, const Problem<scalar_t>& problem, const Backward<scalar_t>& backward);
template <typename scalar_t>
void launch_backward(Cuda, const Problem<scalar_t>& problem, const Backward<scalar_t>& backward);
template <typename scalar_t>
int64_t partial_count(Cpu, const Problem<scalar_t>& problem);
template <typename scalar_t>
int64_t partial_count(Cuda, const Problem<scalar_t>& problem);
}  // namespace ef::fusion
