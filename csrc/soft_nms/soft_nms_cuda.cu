#include "../common/platform.h"
#include "soft_nms.h"
#include "soft_nms_kernel.cuh"

namespace ef::soft_nms {
namespace {
constexpr size_t kSharedBytes = 48 << 10;  // what every device gives a block unasked

template <typename A>
constexpr size_t exchange_bytes() {
  return 2 * kWarps * sizeof(Best<A>);
}
template <typename A>
bool is_shared(int64_t n) {
  return exchange_bytes<A>() + size_t(n) * sizeof(A) <= kSharedBytes;
}
}  // namespace

template <typename scalar_t>
int64_t workspace_bytes(Cuda, int64_t batch, int64_t n) {
  using A = acc_t<scalar_t>;
  return is_shared<A>(n) ? 0 : batch * n * int64_t(sizeof(A));
}

template <typename scalar_t>
void launch(Cuda device, const Problem<scalar_t>& problem, void* workspace, const Detections<scalar_t>& out) {
  using A = acc_t<scalar_t>;
  const auto decay = Decay<A>::of(problem.gaussian, problem.sigma, problem.iou_threshold, problem.score_threshold);
  const bool shared = is_shared<A>(problem.n), aligned = is_vec_aligned(problem.boxes);
  const auto start = [&](auto kernel) {
    ef::launch("soft_nms", kernel, unsigned(problem.batch), kThreads, exchange_bytes<A>() + (shared ? problem.n * sizeof(A) : 0), device,
               problem, decay, shared ? nullptr : static_cast<A*>(workspace), out);
  };
  if (problem.gaussian) {
    start(aligned ? soft_nms_kernel<true, true, scalar_t> : soft_nms_kernel<true, false, scalar_t>);
  } else {
    start(aligned ? soft_nms_kernel<false, true, scalar_t> : soft_nms_kernel<false, false, scalar_t>);
  }
}

#define EF_DEFINE(scalar_t)                                           \
  template int64_t workspace_bytes<scalar_t>(Cuda, int64_t, int64_t); \
  template void launch<scalar_t>(Cuda, const Problem<scalar_t>&, void*, const Detections<scalar_t>&);
EF_FOR_EACH_FLOATING(EF_DEFINE)
#undef EF_DEFINE
}  // namespace ef::soft_nms
