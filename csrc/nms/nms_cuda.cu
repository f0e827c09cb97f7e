#include "../common/choices.h"
#include "../common/platform.h"
#include "nms.h"
#include "nms_block_kernel.cuh"
#include "nms_kernel.cuh"

namespace ef::nms {
namespace {
constexpr int64_t kSmall = 1024;  // up to here a block per image takes all its boxes

bool is_small(int64_t n) { return n <= kSmall; }

// Of a block that goes through n candidates of which it can keep `max_kept`.
int64_t window_of(int64_t n) { return n < kWindow ? ceil_div(n > 1 ? n : 1, kTile) * kTile : kWindow; }
template <typename A>
size_t block_bytes(int64_t n, int64_t max_kept) {
  const int64_t window = window_of(n), list = n > window ? (n < max_kept ? n : max_kept) : 0;
  return 2 * sizeof(TileRows) + (window + list) * sizeof(Candidate<A>);
}
}  // namespace

int64_t workspace_size(Cuda, int64_t batch, int64_t n) { return is_small(n) ? 0 : 1 + 2 * batch * ceil_div(n, kTile); }
int64_t max_padded(Cuda) { return kMaxKeptInBlock; }

template <typename scalar_t>
void launch_keep(Cuda device, const Problem<scalar_t>& problem, int64_t* workspace, bool* keep) {
  using A = acc_t<scalar_t>;
  const A threshold = threshold_in<A>(problem.iou_threshold);
  const bool aligned = is_vec_aligned(problem.boxes);
  if (is_small(problem.n)) {
    const auto kernel = aligned ? nms_small_kernel<true, scalar_t> : nms_small_kernel<false, scalar_t>;
    launch("nms", kernel, unsigned(problem.batch), unsigned(window_of(problem.n)), block_bytes<A>(problem.n, problem.n), device, problem,
           threshold, keep);
  } else {
    Word* words = reinterpret_cast<Word*>(workspace);
    const auto kernel = aligned ? nms_kernel<true, scalar_t> : nms_kernel<false, scalar_t>;
    launch("nms", kernel, unsigned(problem.batch * ceil_div(problem.n, kTile)), kThreads, sizeof(Tile<A>), device, problem, threshold,
           words, words + 1, keep);
  }
}

template <typename scalar_t>
void launch_padded(Cuda device, const BatchProblem<scalar_t>& problem, const Detections<scalar_t>& out) {
  using A = acc_t<scalar_t>;
  const auto kernel = is_vec_aligned(problem.boxes) ? nms_padded_kernel<true, scalar_t> : nms_padded_kernel<false, scalar_t>;
  launch("nms_padded", kernel, unsigned(problem.batch), unsigned(window_of(problem.n)), block_bytes<A>(problem.n, problem.max_detections),
         device, problem, threshold_in<A>(problem.iou_threshold), out);
}

#define EF_DEFINE(scalar_t)                                                             \
  template void launch_keep<scalar_t>(Cuda, const Problem<scalar_t>&, int64_t*, bool*); \
  template void launch_padded<scalar_t>(Cuda, const BatchProblem<scalar_t>&, const Detections<scalar_t>&);
EF_FOR_EACH_FLOATING(EF_DEFINE)
#undef EF_DEFINE
}  // namespace ef::nms
