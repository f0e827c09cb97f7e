#include <algorithm>

#include "../common/platform.h"
#include "focal_loss.h"
#include "focal_loss_kernel.cuh"

namespace ef::focal_loss {
namespace {
constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 132 * 8;  // fills the largest part; fixed, so that a sum has the same bits on every device
constexpr size_t kSumBytes = kThreads / kWarpSize * sizeof(double);

unsigned block_count(int64_t n, int vec) { return unsigned(std::min(kMaxBlocks, ceil_div(n, int64_t(kThreads) * vec))); }

// Calls f.template operator()<modulator, is soft, vector size>() for a problem whose buffers are all aligned, or not.
template <typename scalar_t, class F>
void specialize(const Problem<scalar_t>& problem, bool aligned, F&& f) {
  dispatch_modulator(problem.options.gamma, [&]<Modulator kModulator>() {
    constexpr int kVec = kVecSize<scalar_t>;
    if (problem.soft) {
      aligned ? f.template operator()<kModulator, true, kVec>() : f.template operator()<kModulator, true, 1>();
    } else {
      const bool vectors = aligned && problem.classes < kMaxClasses;
      vectors ? f.template operator()<kModulator, false, kVec>() : f.template operator()<kModulator, false, 1>();
    }
  });
}

template <typename scalar_t>
Parameters<acc_t<scalar_t>> parameters(const Problem<scalar_t>& problem) {
  return Parameters<acc_t<scalar_t>>::of(problem.options.alpha, problem.options.gamma, problem.options.smoothing);
}
}  // namespace

// A function of the size alone (the scalar path may use fewer of them than there are).
int64_t partial_count(Cuda, int64_t rows, int64_t classes) { return block_count(rows * classes, 1); }

template <typename scalar_t>
void launch_forward(Cuda device, const Problem<scalar_t>& problem, scalar_t* loss) {
  const bool aligned = is_vec_aligned(problem.logits, problem.soft, loss);
  specialize(problem, aligned, [&]<Modulator kModulator, bool kSoft, int kVec>() {
    launch("focal_loss", focal_loss_kernel<kModulator, kSoft, kVec, scalar_t>, block_count(problem.rows * problem.classes, kVec), kThreads,
           0, device, problem, parameters(problem), loss);
  });
}

template <typename scalar_t>
void launch_sum(Cuda device, const Problem<scalar_t>& problem, acc_t<scalar_t>* partials, acc_t<scalar_t>* sum) {
  specialize(problem, is_vec_aligned(problem.logits, problem.soft), [&]<Modulator kModulator, bool kSoft, int kVec>() {
    const unsigned blocks = block_count(problem.rows * problem.classes, kVec);
    launch("focal_loss_sum", focal_loss_sum_kernel<kModulator, kSoft, kVec, scalar_t>, blocks, kThreads, kSumBytes, device, problem,
           parameters(problem), partials);
    launch("focal_loss_sum", add_partials_kernel<acc_t<scalar_t>>, 1, kThreads, kSumBytes, device, partials, int64_t(blocks), sum);
  });
}

template <typename scalar_t>
void launch_backward(Cuda device, const Problem<scalar_t>& problem, const scalar_t* grad_loss, const acc_t<scalar_t>* grad_sum,
                     scalar_t* grad_logits) {
  const bool aligned = is_vec_aligned(problem.logits, problem.soft, grad_loss, grad_logits);
  specialize(problem, aligned, [&]<Modulator kModulator, bool kSoft, int kVec>() {
    launch("focal_loss_backward", focal_loss_backward_kernel<kModulator, kSoft, kVec, scalar_t>,
           block_count(problem.rows * problem.classes, kVec), kThreads, 0, device, problem, parameters(problem), grad_loss, grad_sum,
           grad_logits);
  });
}

#define EF_DEFINE(scalar_t)                                                                               \
  template void launch_forward<scalar_t>(Cuda, const Problem<scalar_t>&, scalar_t*);                      \
  template void launch_sum<scalar_t>(Cuda, const Problem<scalar_t>&, acc_t<scalar_t>*, acc_t<scalar_t>*); \
  template void launch_backward<scalar_t>(Cuda, const Problem<scalar_t>&, const scalar_t*, const acc_t<scalar_t>*, scalar_t*);
EF_FOR_EACH_FLOATING(EF_DEFINE)
#undef EF_DEFINE
}  // namespace ef::focal_loss
