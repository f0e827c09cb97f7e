// Rows are cut into chunks of about kChunk logits. With labels a row is first done as background, then its one positive is mended: the
// inner loop has no branch and vectorises. Sums are kept per chunk, then added in order: the result does not depend on the threads.
#include <algorithm>

#include "../common/dtypes.h"
#include "../common/parallel.h"
#include "focal_loss.h"
#include "focal_loss_math.h"

namespace ef::focal_loss {
namespace {
constexpr int64_t kChunk = 1 << 13;

int64_t rows_per_chunk(int64_t classes) { return std::max<int64_t>(1, kChunk / std::max<int64_t>(1, classes)); }

template <Modulator kModulator, typename scalar_t>
EF_CPU_CLONES void forward_rows(const Problem<scalar_t>& in, const Parameters<acc_t<scalar_t>> p, scalar_t* __restrict out, int64_t begin,
                                int64_t end) {
  using A = acc_t<scalar_t>;
  if (in.soft) {
    const scalar_t* __restrict logits = in.logits, * __restrict soft = in.soft;
    const int64_t first = begin * in.classes, last = end * in.classes;
    for (int64_t i = first; i < last; ++i) out[i] = scalar_t(soft_loss<kModulator>(A(logits[i]), A(soft[i]), p));
    return;
  }
  for (int64_t row = begin; row < end; ++row) {
    const scalar_t* __restrict x = in.logits + row * in.classes;
    scalar_t* __restrict y = out + row * in.classes;
    const int64_t label = in.labels[row];
    if (label == -2) {
      for (int64_t c = 0; c < in.classes; ++c) y[c] = scalar_t(0.f);
      continue;
    }
    for (int64_t c = 0; c < in.classes; ++c) y[c] = scalar_t(p.alpha_negative * hard_loss<kModulator>(A(x[c]), p));
    if (label >= 0 && label < in.classes) y[label] = scalar_t(p.alpha_positive * hard_loss<kModulator>(-A(x[label]), p));
  }
}

template <Modulator kModulator, typename scalar_t>
EF_CPU_CLONES acc_t<scalar_t> sum_rows(const Problem<scalar_t>& in, const Parameters<acc_t<scalar_t>> p, int64_t begin, int64_t end) {
  using A = acc_t<scalar_t>;
  A sum = 0;
  if (in.soft) {
    const scalar_t* __restrict logits = in.logits, * __restrict soft = in.soft;
    const int64_t first = begin * in.classes, last = end * in.classes;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = first; i < last; ++i) sum += soft_loss<kModulator>(A(logits[i]), A(soft[i]), p);
    return sum;
  }
  for (int64_t row = begin; row < end; ++row) {
    const scalar_t* __restrict x = in.logits + row * in.classes;
    const int64_t label = in.labels[row];
    if (label == -2) continue;
    A background = 0;
    if (label >= 0 && label < in.classes) {  // in two parts: taking the positive away again would cancel digits
#pragma omp simd reduction(+ : background)
      for (int64_t c = 0; c < label; ++c) background += hard_loss<kModulator>(A(x[c]), p);
#pragma omp simd reduction(+ : background)
      for (int64_t c = label + 1; c < in.classes; ++c) background += hard_loss<kModulator>(A(x[c]), p);
      sum += p.alpha_positive * hard_loss<kModulator>(-A(x[label]), p);
    } else {
#pragma omp simd reduction(+ : background)
      for (int64_t c = 0; c < in.classes; ++c) background += hard_loss<kModulator>(A(x[c]), p);
    }
    sum += p.alpha_negative * background;
  }
  return sum;
}

template <Modulator kModulator, typename scalar_t>
EF_CPU_CLONES void backward_rows(const Problem<scalar_t>& in, const Parameters<acc_t<scalar_t>> p, const scalar_t* __restrict grad_loss,
                                 acc_t<scalar_t> scale, scalar_t* __restrict out, int64_t begin, int64_t end) {
  using A = acc_t<scalar_t>;
  if (in.soft) {
    const scalar_t* __restrict logits = in.logits, * __restrict soft = in.soft;
    const int64_t first = begin * in.classes, last = end * in.classes;
    if (grad_loss) {
      for (int64_t i = first; i < last; ++i) out[i] = scalar_t(A(grad_loss[i]) * soft_grad<kModulator>(A(logits[i]), A(soft[i]), p));
    } else {
      for (int64_t i = first; i < last; ++i) out[i] = scalar_t(scale * soft_grad<kModulator>(A(logits[i]), A(soft[i]), p));
    }
    return;
  }
  for (int64_t row = begin; row < end; ++row) {
    const scalar_t* __restrict x = in.logits + row * in.classes;
    scalar_t* __restrict y = out + row * in.classes;
    const int64_t label = in.labels[row];
    if (label == -2) {
      for (int64_t c = 0; c < in.classes; ++c) y[c] = scalar_t(0.f);
      continue;
    }
    if (grad_loss) {
      const scalar_t* __restrict g = grad_loss + row * in.classes;
      for (int64_t c = 0; c < in.classes; ++c) y[c] = scalar_t(A(g[c]) * p.alpha_negative * hard_grad<kModulator>(A(x[c]), p));
    } else {
      const A negative = scale * p.alpha_negative;
      for (int64_t c = 0; c < in.classes; ++c) y[c] = scalar_t(negative * hard_grad<kModulator>(A(x[c]), p));
    }
    if (label >= 0 && label < in.classes) {
      const A upstream = grad_loss ? A(grad_loss[row * in.classes + label]) : scale;
      y[label] = scalar_t(-upstream * p.alpha_positive * hard_grad<kModulator>(-A(x[label]), p));
    }
  }
}

// f(chunk, first row, last row + 1) for every chunk, on several threads.
template <class F>
void for_each_chunk(int64_t rows, int64_t classes, const F& f) {
  const int64_t step = rows_per_chunk(classes);
  parallel_for(ceil_div(rows, step), 2, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) f(chunk, chunk * step, std::min(rows, (chunk + 1) * step));
  });
}
}  // namespace

int64_t partial_count(Cpu, int64_t rows, int64_t classes) { return ceil_div(rows, rows_per_chunk(classes)); }

template <typename scalar_t>
void launch_forward(Cpu, const Problem<scalar_t>& problem, scalar_t* loss) {
  const auto p = Parameters<acc_t<scalar_t>>::of(problem.options.alpha, problem.options.gamma, problem.options.smoothing);
  dispatch_modulator(problem.options.gamma, [&]<Modulator kModulator>() {
    for_each_chunk(problem.rows, problem.classes,
                   [&](int64_t, int64_t begin, int64_t end) { forward_rows<kModulator>(problem, p, loss, begin, end); });
  });
}

template <typename scalar_t>
void launch_sum(Cpu, const Problem<scalar_t>& problem, acc_t<scalar_t>* partials, acc_t<scalar_t>* sum) {
  const auto p = Parameters<acc_t<scalar_t>>::of(problem.options.alpha, problem.options.gamma, problem.options.smoothing);
  dispatch_modulator(problem.options.gamma, [&]<Modulator kModulator>() {
    for_each_chunk(problem.rows, problem.classes,
                   [&](int64_t chunk, int64_t begin, int64_t end) { partials[chunk] = sum_rows<kModulator>(problem, p, begin, end); });
  });
  double total = 0;
  for (int64_t i = 0; i < partial_count(Cpu{}, problem.rows, problem.classes); ++i) total += partials[i];
  *sum = acc_t<scalar_t>(total);
}

template <typename scalar_t>
void launch_backward(Cpu, const Problem<scalar_t>& problem, const scalar_t* grad_loss, const acc_t<scalar_t>* grad_sum,
                     scalar_t* grad_logits) {
  const auto p = Parameters<acc_t<scalar_t>>::of(problem.options.alpha, problem.options.gamma, problem.options.smoothing);
  const acc_t<scalar_t> scale = grad_sum ? *grad_sum : 0;
  dispatch_modulator(problem.options.gamma, [&]<Modulator kModulator>() {
    for_each_chunk(problem.rows, problem.classes, [&](int64_t, int64_t begin, int64_t end) {
      backward_rows<kModulator>(problem, p, grad_loss, scale, grad_logits, begin, end);
    });
  });
}

#define EF_DEFINE(scalar_t)                                                                              \
  template void launch_forward<scalar_t>(Cpu, const Problem<scalar_t>&, scalar_t*);                      \
  template void launch_sum<scalar_t>(Cpu, const Problem<scalar_t>&, acc_t<scalar_t>*, acc_t<scalar_t>*); \
  template void launch_backward<scalar_t>(Cpu, const Problem<scalar_t>&, const scalar_t*, const acc_t<scalar_t>*, scalar_t*);
EF_FOR_EACH_FLOATING(EF_DEFINE)
#undef EF_DEFINE
}  // namespace ef::focal_loss
