#include <algorithm>
#include <cstring>

#include "anchor_matching.h"
#include "anchor_matching_kernel.cuh"

namespace ef::anchor_matching {
namespace {
constexpr int64_t kMaxGridY = 65535;
}  // namespace

int64_t workspace_size(Cuda, int64_t batch, int64_t max_boxes) { return 2 * batch * max_boxes; }  // best, first

template <typename T>
void launch_match(Cuda device, const Problem<T>& problem, int64_t* workspace, const Targets<T>& out) {
  const dim3 grid(unsigned(ceil_div(problem.count, kThreads)), unsigned(std::min(problem.batch, kMaxGridY)));
  Word* best = reinterpret_cast<Word*>(workspace);
  Word* first = best + problem.batch * problem.max_boxes;
  const auto write = [&]<ForcedMatch kForce>() {
    launch("match_anchors_write", write_kernel<kForce, T>, grid, kThreads, 0, device, problem, best, first, out);
  };
  if (problem.force == ForcedMatch::kNone || problem.max_boxes == 0) return write.template operator()<ForcedMatch::kNone>();
  launch("match_anchors_best", best_kernel<T>, grid, kThreads, 0, device, problem, best);
  if (problem.force == ForcedMatch::kTies) return write.template operator()<ForcedMatch::kTies>();
  launch("match_anchors_first", first_kernel<T>, grid, kThreads, 0, device, problem, best, first);
  write.template operator()<ForcedMatch::kFirst>();
}

#define EF_DEFINE(T) template void launch_match<T>(Cuda, const Problem<T>&, int64_t*, const Targets<T>&);
EF_DEFINE(float)
EF_DEFINE(double)
#undef EF_DEFINE
}  // namespace ef::anchor_matching
