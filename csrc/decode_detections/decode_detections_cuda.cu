#include <algorithm>
#include <bit>

#include "../common/platform.h"
#include "decode_detections.h"
#include "decode_detections_kernel.cuh"

namespace ef::decode_detections {
namespace {
constexpr int64_t kMaxBlocks = 132 * 8;   // fills the largest part
constexpr int64_t kLogitsPerThread = 32;  // at least, before another block pays
}  // namespace

template <typename scalar_t>
int64_t state_bytes(Cuda, const Problem<scalar_t>& problem) {
  return problem.batch * int64_t(sizeof(State<acc_t<scalar_t>>));
}
template <typename scalar_t>
int64_t list_bytes(Cuda, const Problem<scalar_t>& problem) {
  return problem.batch * problem.candidates * int64_t(sizeof(Candidate<acc_t<scalar_t>>));
}

template <typename scalar_t>
void launch(Cuda device, const Problem<scalar_t>& problem, void* state, void* list, const Candidates<acc_t<scalar_t>>& out) {
  using A = acc_t<scalar_t>;
  auto* states = static_cast<State<A>*>(state);
  auto* found = static_cast<Candidate<A>*>(list);
  const int64_t total = problem.cells * problem.channels();
  const uint64_t last_place = uint64_t(total) - 1;
  const int64_t max_blocks = std::max<int64_t>(1, kMaxBlocks / problem.batch);
  const dim3 grid(unsigned(std::clamp<int64_t>(ceil_div(total, kThreads * kLogitsPerThread), 1, max_blocks)), unsigned(problem.batch));
  const auto pass = [&](Digit digit, bool is_first) {
    ef::launch("decode_candidates", count_kernel<scalar_t>, grid, kThreads, kBins * sizeof(Count), device, problem, digit, last_place,
               states);
    ef::launch("decode_candidates", extend_cut_kernel<A>, unsigned(problem.batch), kThreads, kThreads * sizeof(Count), device, states,
               digit, is_first, Count(problem.candidates));
  };
  const auto passes = [&](bool of_key, int bits) {
    for (int above = bits; above > 0; above -= kDigitBits) {
      const int shift = std::max(0, above - kDigitBits);
      pass({of_key, shift, above - shift}, of_key && above == bits);
    }
  };
  passes(true, 8 * sizeof(Key<A>));
  passes(false, std::bit_width(last_place));
  ef::launch("decode_candidates", collect_kernel<scalar_t>, grid, kThreads, 0, device, problem, last_place, states, found);
  const dim3 ranks(unsigned(ceil_div(problem.candidates, kThreads)), unsigned(problem.batch));
  ef::launch("decode_candidates", rank_kernel<scalar_t>, ranks, kThreads, kThreads * sizeof(Candidate<A>), device, problem, found, out);
}

#define EF_DEFINE(scalar_t)                                               \
  template int64_t state_bytes<scalar_t>(Cuda, const Problem<scalar_t>&); \
  template int64_t list_bytes<scalar_t>(Cuda, const Problem<scalar_t>&);  \
  template void launch<scalar_t>(Cuda, const Problem<scalar_t>&, void*, void*, const Candidates<acc_t<scalar_t>>&);
EF_FOR_EACH_FLOATING(EF_DEFINE)
#undef EF_DEFINE
}  // namespace ef::decode_detections
