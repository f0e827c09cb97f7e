#include "../common/dtypes.h"
#include "nms.h"
#include "nms_kernel.cuh"

namespace ef::nms {
namespace {
constexpr int64_t kSharedSlots = 1024;  // kept boxes of an image that shared memory holds
}  // namespace

int64_t workspace_size(Cuda, int64_t n) { return 1 + 2 * ceil_div(n, kTile); }

template <typename scalar_t>
void launch_keep(Cuda device, const Problem<scalar_t>& problem, int64_t* workspace, bool* keep) {
  using A = acc_t<scalar_t>;
  Word* words = reinterpret_cast<Word*>(workspace);
  const auto kernel = is_vec_aligned(problem.boxes) ? nms_kernel<true, scalar_t> : nms_kernel<false, scalar_t>;
  launch("nms", kernel, unsigned(ceil_div(problem.n, kTile)), kThreads, sizeof(Tile<A>), device, problem,
         threshold_in<A>(problem.iou_threshold), words, words + 1, keep);
}

template <typename scalar_t>
int64_t batch_workspace_bytes(Cuda, int64_t batch, int64_t slots) {
  return slots <= kSharedSlots ? 0 : batch * slots * int64_t(sizeof(Kept<acc_t<scalar_t>>));
}

template <typename scalar_t>
void launch_padded(Cuda device, const BatchProblem<scalar_t>& problem, void* workspace, const BatchDetections<scalar_t>& out) {
  using A = acc_t<scalar_t>;
  const int64_t slots = problem.n < problem.max_detections ? problem.n : problem.max_detections;
  const bool shared = slots <= kSharedSlots;
  const size_t bytes = sizeof(Tile<A>) + (shared ? slots * sizeof(Kept<A>) : 0);
  const auto kernel = is_vec_aligned(problem.boxes) ? nms_padded_kernel<true, scalar_t> : nms_padded_kernel<false, scalar_t>;
  launch("nms_padded", kernel, unsigned(problem.batch), kThreads, bytes, device, problem, threshold_in<A>(problem.iou_threshold),
         shared ? nullptr : static_cast<Kept<A>*>(workspace), int(slots), out);
}

#define EF_DEFINE(scalar_t)                                                             \
  template void launch_keep<scalar_t>(Cuda, const Problem<scalar_t>&, int64_t*, bool*); \
  template int64_t batch_workspace_bytes<scalar_t>(Cuda, int64_t, int64_t);             \
  template void launch_padded<scalar_t>(Cuda, const BatchProblem<scalar_t>&, void*, const BatchDetections<scalar_t>&);
EF_FOR_EACH_FLOATING(EF_DEFINE)
#undef EF_DEFINE
}  // namespace ef::nms
