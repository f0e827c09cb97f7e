// Rows are cut into chunks of about kChunk logits. With labels a row is first done as background, then its one positive is mended: the
// inner loop has no branch and vectorizes. Sums are kept per chunk, then added in order: the result does not depend on the threads.
#include <algorithm>

#include "../common/parallel.h"
#include "../common/platform.h"
#include "focal_loss.h"
#include "focal_loss_math.h"

namespace ef::focal_loss {
namespace {
constexpr int64_t kChunk = 1 << 13;

int64_t rows_per_chunk(int64_t classes) { return std::max<int64_t>(1, kChunk / std::max<int64_t>(1, classes)); }

// How many logits a loop over soft targets takes at once: all where no class has a weight, else a row.
template <class Weight, typename scalar_t>
int64_t soft_run(const Problem<scalar_t>& in, int64_t begin, int64_t end) {
  return std::is_pointer_v<Weight> ? in.classes : (end - begin) * in.classes;
}

template <Modulator kModulator, class Weight, typename scalar_t>
EF_CPU_CLONES void forward_rows(const Problem<scalar_t>& in, const Parameters<acc_t<scalar_t>> p, const Weight weight,
                                scalar_t* __restrict out, int64_t begin, int64_t end) {
  using A = acc_t<scalar_t>;
  if (in.soft) {
    const int64_t run = soft_run<Weight>(in, begin, end);
    for (int64_t i = begin * in.classes; i < end * in.classes; i += run) {
      const scalar_t* __restrict logits = in.logits + i, * __restrict soft = in.soft + i;
      for (int64_t c = 0; c < run; ++c) out[i + c] = scalar_t(weight[c] * soft_loss<kModulator>(A(logits[c]), A(soft[c]), p));
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
    for (int64_t c = 0; c < in.classes; ++c) y[c] = scalar_t(weight[c] * (p.alpha_negative * hard_loss<kModulator>(A(x[c]), p)));
    if (label >= 0 && label < in.classes) y[label] = scalar_t(weight[label] * (p.alpha_positive * hard_loss<kModulator>(-A(x[label]), p)));
  }
}

template <Modulator kModulator, class Weight, typename scalar_t>
EF_CPU_CLONES acc_t<scalar_t> sum_rows(const Problem<scalar_t>& in, const Parameters<acc_t<scalar_t>> p, const Weight weight, int64_t begin,
                                       int64_t end) {
  using A = acc_t<scalar_t>;
  A sum = 0;
  if (in.soft) {
    const int64_t run = soft_run<Weight>(in, begin, end);
    for (int64_t i = begin * in.classes; i < end * in.classes; i += run) {
      const scalar_t* __restrict logits = in.logits + i, * __restrict soft = in.soft + i;
#pragma omp simd reduction(+ : sum)
      for (int64_t c = 0; c < run; ++c) sum += weight[c] * soft_loss<kModulator>(A(logits[c]), A(soft[c]), p);
    }
    return sum;
  }
  for (int64_t row = begin; row < end; ++row) {
    const scalar_t* __restrict x = in.logits + row * in.classes;
    const int64_t label = in.labels[row];
    if (label == -2) continue;
    A background = 0;
    if (label >= 0 && label < in.classes) {  // in two parts: taking the positive away again would cancel digits
#pragma omp simd reduction(+ : background)
      for (int64_t c = 0; c < label; ++c) background += weight[c] * hard_loss<kModulator>(A(x[c]), p);
#pragma omp simd reduction(+ : background)
      for (int64_t c = label + 1; c < in.classes; ++c) background += weight[c] * hard_loss<kModulator>(A(x[c]), p);
      sum += weight[label] * (p.alpha_positive * hard_loss<kModulator>(-A(x[label]), p));
    } else {
#pragma omp simd reduction(+ : background)
      for (int64_t c = 0; c < in.classes; ++c) background += weight[c] * hard_loss<kModulator>(A(x[c]), p);
    }
    sum += p.alpha_negative * background;
  }
  return sum;
}

template <Modulator kModulator, class Weight, typename scalar_t>
EF_CPU_CLONES void backward_rows(const Problem<scalar_t>& in, const Parameters<acc_t<scalar_t>> p, const Weight weight,
                                 const scalar_t* __restrict grad_loss, acc_t<scalar_t> scale, scalar_t* __restrict out, int64_t begin,
                                 int64_t end) {
  using A = acc_t<scalar_t>;
  if (in.soft) {
    const int64_t run = soft_run<Weight>(in, begin, end);
    for (int64_t i = begin * in.classes; i < end * in.classes; i += run) {
      const scalar_t* __restrict logits = in.logits + i, * __restrict soft = in.soft + i;
      if (grad_loss) {
        for (int64_t c = 0; c < run; ++c)
          out[i + c] = scalar_t(weight[c] * (A(grad_loss[i + c]) * soft_grad<kModulator>(A(logits[c]), A(soft[c]), p)));
      } else {
        for (int64_t c = 0; c < run; ++c) out[i + c] = scalar_t(weight[c] * (scale * soft_grad<kModulator>(A(logits[c]), A(soft[c]), p)));
      }
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
      for (int64_t c = 0; c < in.classes; ++c)
        y[c] = scalar_t(weight[c] * (A(g[c]) * p.alpha_negative * hard_grad<kModulator>(A(x[c]), p)));
    } else {
      const A negative = scale * p.alpha_negative;
      for (int64_t c = 0; c < in.classes; ++c) y[c] = scalar_t(weight[c] * (negative * hard_grad<kModulator>(A(x[c]), p)));
    }
    if (label >= 0 && label < in.classes) {
      const A upstream = grad_loss ? A(grad_loss[row * in.classes + label]) : scale;
      y[label] = scalar_t(weight[label] * (-upstream * p.alpha_positive * hard_grad<kModulator>(-A(x[label]), p)));
    }
  }
}

// f.template operator()<modulator>(class weights, chunk, first row, last row + 1) for every chunk, on several threads.
template <typename scalar_t, class F>
void for_each_chunk(const Problem<scalar_t>& problem, const F& f) {
  const int64_t step = rows_per_chunk(problem.classes);
  const auto run = [&]<Modulator kModulator>(const auto& weight) {
    parallel_for(ceil_div(problem.rows, step), 2, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk)
        f.template operator()<kModulator>(weight, chunk, chunk * step, std::min(problem.rows, (chunk + 1) * step));
    });
  };
  dispatch_modulator(problem.options.gamma, [&]<Modulator kModulator>() {
    if (problem.class_weight) {
      run.template operator()<kModulator>(problem.class_weight);
    } else {
      run.template operator()<kModulator>(NoClassWeight<acc_t<scalar_t>>{});
    }
  });
}
}  // namespace

int64_t partial_count(Cpu, int64_t rows, int64_t classes) { return ceil_div(rows, rows_per_chunk(classes)); }

template <typename scalar_t>
void launch_forward(Cpu, const Problem<scalar_t>& problem, scalar_t* loss) {
  const auto p = Parameters<acc_t<scalar_t>>::of(problem.options.alpha, problem.options.gamma, problem.options.smoothing);
  for_each_chunk(problem, [&]<Modulator kModulator>(const auto& weight, int64_t, int64_t begin, int64_t end) {
    forward_rows<kModulator>(problem, p, weight, loss, begin, end);
  });
}

template <typename scalar_t>
void launch_sum(Cpu, const Problem<scalar_t>& problem, acc_t<scalar_t>* partials, acc_t<scalar_t>* sum) {
  const auto p = Parameters<acc_t<scalar_t>>::of(problem.options.alpha, problem.options.gamma, problem.options.smoothing);
  for_each_chunk(problem, [&]<Modulator kModulator>(const auto& weight, int64_t chunk, int64_t begin, int64_t end) {
    partials[chunk] = sum_rows<kModulator>(problem, p, weight, begin, end);
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
  for_each_chunk(problem, [&]<Modulator kModulator>(const auto& weight, int64_t, int64_t begin, int64_t end) {
    backward_rows<kModulator>(problem, p, weight, grad_loss, scale, grad_logits, begin, end);
  });
}

#define EF_DEFINE(scalar_t)                                                                              \
  template void launch_forward<scalar_t>(Cpu, const Problem<scalar_t>&, scalar_t*);                      \
  template void launch_sum<scalar_t>(Cpu, const Problem<scalar_t>&, acc_t<scalar_t>*, acc_t<scalar_t>*); \
  template void launch_backward<scalar_t>(Cpu, const Problem<scalar_t>&, const scalar_t*, const acc_t<scalar_t>*, scalar_t*);
EF_FOR_EACH_FLOATING(EF_DEFINE)
#undef EF_DEFINE
}  // namespace ef::focal_loss
