// Radix select over (key, place): the cut is found digit by digit of kDigitBits, first of the key, then of the inverted place, so that
// of equal logits the first are taken. A pass reads all logits of an image that agree with the digits found so far and counts their
// next digit; then one block finds the digit in which the wanted number is reached. Counts are integers, so the order of the atomics
// does not matter. Once a digit is reached exactly, the cut is known and the passes left return at once: without ties all of the place.
// collect_kernel then gathers what is not below the cut, in any order, and rank_kernel gives each its rank by counting those before
// it, and decodes it there. A thread reads 16 bytes at a time. Bytes: one read of the logits per
// pass of the key (3 in float32) and one to collect; the rest is small. Key histograms are kept in shared memory; a thread joins equal
// neighbors, as most logits share their first digit.
#pragma once
#include "../common/launch.cuh"
#include "../common/vec.cuh"
#include "decode_detections.h"

namespace ef::decode_detections {
inline constexpr int kThreads = 256;
inline constexpr int kDigitBits = 11;
inline constexpr int kBins = 1 << kDigitBits;
inline constexpr int kBinsPerThread = kBins / kThreads;
using Count = unsigned;  // logits of an image

// Of an image, zero at the start.
template <typename T>
struct State {
  Count bins[kBins];
  Key<T> key;         // the cut: digits found so far, zeros below
  uint64_t inverse;   // of the place, likewise
  Count missing;      // how many of those that agree with the digits found are still to be taken
  unsigned is_exact;  // all of them: the cut is known
  Count collected;
};

// A digit: `bits` bits above `shift`, of the key or of the inverted place.
struct Digit {
  bool of_key;
  int shift, bits;
};
template <typename U>
EF_HD unsigned digit_of(U x, const Digit& digit) {
  return unsigned(x >> digit.shift) & ((1u << digit.bits) - 1);
}
// Whether x agrees with the cut in all bits above the digit.
template <typename U>
EF_HD bool agrees(U x, U cut, const Digit& digit) {
  const int above = digit.shift + digit.bits;
  return above >= int(8 * sizeof(U)) || (x ^ cut) >> above == 0;
}

// Calls f(key, place) for the image's logits that belong to the block.
template <typename scalar_t, class F>
__device__ void for_each_logit(const Problem<scalar_t>& in, int64_t image, F&& f) {
  using A = acc_t<scalar_t>;
  constexpr int kVec = kVecSize<scalar_t>;
  const int64_t channels = in.channels(), thread = blockIdx.x * int64_t(kThreads) + threadIdx.x, threads = gridDim.x * int64_t(kThreads);
  for (int l = 0; l < in.level_count; ++l) {
    const Level<scalar_t>& level = in.levels[l];
    const int64_t n = level.cells * channels, first = level.first_cell * channels;
    const scalar_t* x = level.logits + image * n;
    const auto visit = [&](int64_t i, scalar_t value) {
      const auto place = [&] {
        if (level.logits_channels_last) return first + i;
        const int64_t channel = i / level.cells;
        return first + (i - channel * level.cells) * channels + channel;
      };
      f(key_of(A(value)), place);
    };
    const bool aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0;
    const int64_t vectors = aligned ? n / kVec : 0;
    for (int64_t v = thread; v < vectors; v += threads) {
      const Vec<scalar_t, kVec> values = load_vec<kVec>(x + v * kVec);
#pragma unroll
      for (int k = 0; k < kVec; ++k) visit(v * kVec + k, values.v[k]);
    }
    for (int64_t i = vectors * kVec + thread; i < n; i += threads) visit(i, x[i]);
  }
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) count_kernel(Problem<scalar_t> in, Digit digit, uint64_t last_place,
                                                         State<acc_t<scalar_t>>* states) {  // [batch]
  using A = acc_t<scalar_t>;
  State<A>& state = states[blockIdx.y];
  if (state.is_exact) return;
  Count* bins = shared_memory<Count>();  // [kBins]
  for (int i = threadIdx.x; i < kBins; i += kThreads) bins[i] = 0;
  __syncthreads();
  const Key<A> key_cut = state.key;
  const uint64_t inverse_cut = state.inverse;
  unsigned run = 0;
  Count length = 0;
  for_each_logit(in, blockIdx.y, [&](Key<A> key, const auto& place) {
    unsigned found;
    if (digit.of_key) {
      if (!agrees(key, key_cut, digit)) return;
      found = digit_of(key, digit);
    } else {
      if (key != key_cut) return;
      const uint64_t inverse = last_place - place();
      if (!agrees(inverse, inverse_cut, digit)) return;
      found = digit_of(inverse, digit);
    }
    if (found != run) {
      if (length) atomicAdd(bins + run, length);
      run = found;
      length = 0;
    }
    ++length;
  });
  if (length) atomicAdd(bins + run, length);
  __syncthreads();
  for (int i = threadIdx.x; i < kBins; i += kThreads) {
    if (bins[i]) atomicAdd(state.bins + i, bins[i]);
  }
}

// A block per image: extends the cut by a digit, and clears the bins.
template <typename T>
__global__ void __launch_bounds__(kThreads) extend_cut_kernel(State<T>* states, Digit digit, bool is_first, Count wanted) {
  State<T>& state = states[blockIdx.x];
  if (state.is_exact) return;
  Count* sums = shared_memory<Count>();  // [kThreads], over neighboring bins
  Count sum = 0;
  for (int k = 0; k < kBinsPerThread; ++k) sum += state.bins[threadIdx.x * kBinsPerThread + k];
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    Count missing = is_first ? wanted : state.missing;
    int group = kThreads - 1;
    for (; sums[group] < missing; --group) missing -= sums[group];
    int bin = group * kBinsPerThread + kBinsPerThread - 1;
    for (; state.bins[bin] < missing; --bin) missing -= state.bins[bin];
    if (digit.of_key) {
      state.key |= Key<T>(bin) << digit.shift;
    } else {
      state.inverse |= uint64_t(bin) << digit.shift;
    }
    state.missing = missing;
    state.is_exact = state.bins[bin] == missing;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kBins; i += kThreads) state.bins[i] = 0;
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) collect_kernel(Problem<scalar_t> in, uint64_t last_place, State<acc_t<scalar_t>>* states,
                                                           Candidate<acc_t<scalar_t>>* list) {  // [batch, candidates]
  using A = acc_t<scalar_t>;
  State<A>& state = states[blockIdx.y];
  const Key<A> key_cut = state.key;
  const uint64_t inverse_cut = state.inverse;
  Candidate<A>* found = list + blockIdx.y * in.candidates;
  for_each_logit(in, blockIdx.y, [&](Key<A> key, const auto& place) {
    if (key < key_cut) return;
    const int64_t index = place();
    if (key == key_cut && last_place - index < inverse_cut) return;
    found[atomicAdd(&state.collected, Count(1))] = {key, index};
  });
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    rank_kernel(Problem<scalar_t> in, const Candidate<acc_t<scalar_t>>* __restrict__ list, Candidates<acc_t<scalar_t>> out) {
  using A = acc_t<scalar_t>;
  Candidate<A>* others = shared_memory<Candidate<A>>();  // [kThreads]
  const int64_t image = blockIdx.y, i = blockIdx.x * int64_t(kThreads) + threadIdx.x;
  list += image * in.candidates;
  const bool is_there = i < in.candidates;
  const Candidate<A> mine = list[is_there ? i : 0];
  int64_t rank = 0;
  for (int64_t begin = 0; begin < in.candidates; begin += kThreads) {
    const int count = in.candidates - begin < kThreads ? int(in.candidates - begin) : kThreads;
    if (threadIdx.x < count) others[threadIdx.x] = list[begin + threadIdx.x];
    __syncthreads();
    for (int k = 0; k < count; ++k) rank += is_before(others[k], mine);
    __syncthreads();
  }
  if (is_there) write_candidate(in, image, rank, mine, out);
}
}  // namespace ef::decode_detections
