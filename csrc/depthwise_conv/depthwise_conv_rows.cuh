// How the depthwise kernels on CUDA come by their filter and by the columns of one row of a map after the other, and how they store a
// row.
#pragma once
#include "../common/launch.cuh"
#include "../common/vec.cuh"
#include "depthwise_conv.h"

namespace ef::depthwise_conv {
inline constexpr int kThreads = 128;

struct Strides {
  int64_t image, channel, row, column;
  EF_HD Strides kept() const { return {image, channel, ef::kept(row), ef::kept(column)}; }  // those that are used in each row
};
EF_HD Strides strides_of(const Shape& s, int64_t h, int64_t w) {
  if (s.channels_last) return {h * w * s.c, 1, w * s.c, s.c};
  return {s.c * h * w, h * w, w, 1};
}

// The columns first + i of a row, i < kCount, that are inside it, as bits: they are the same in every row.
template <int kCount>
__device__ unsigned inside(int first, int columns) {
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) bits |= unsigned(unsigned(first + i) < unsigned(columns)) << i;
  return bits;
}

// kCount columns of a row as they are stored, `step` apart: row[i step] where `valid` has bit i, else zero, which every prologue keeps.
// kWide > 1: from kBefore on so many of them are one aligned vector. `kSteps`: each address is a step from the one before, which the
// counts of instructions favor in all kernels but one.
template <int kBefore, int kWide, int kCount, int kVec, bool kSteps, typename scalar_t>
class Columns {
 public:
  // Those outside stay as they are.
  __device__ void load(const scalar_t* row, unsigned valid, int64_t step) {
    if constexpr (kWide > 1) wide_ = load_packed<kWide>(row + kBefore);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if ((valid >> i & 1) && !is_wide(i)) column_[i] = load_packed<kVec>(row);
      row += step;
      if constexpr (kSteps) forget_origin(row);
    }
  }
  template <typename A>
  __device__ void unpack_to(A (&values)[kCount][kVec]) const {
    A wide[kWide];
    unpack(wide_, wide);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (is_wide(i)) {
        values[i][0] = wide[is_wide(i) ? i - kBefore : 0];
      } else {
        unpack(column_[i], values[i]);
      }
    }
  }

 private:
  EF_HD static constexpr bool is_wide(int i) { return kWide > 1 && i >= kBefore && i < kBefore + kWide; }
  Packed<scalar_t, kVec> column_[kCount] = {};
  Packed<scalar_t, kWide> wide_ = {};
};

// row[i step] = values[i] where `valid` has bit i. `kWide`: they are one aligned vector.
template <bool kWide, int kCount, int kVec, typename scalar_t, typename A>
__device__ void store_columns(scalar_t* row, unsigned valid, int64_t step, const A (&values)[kCount][kVec]) {
  if constexpr (kWide) {
    Vec<scalar_t, kCount> result;
#pragma unroll
    for (int i = 0; i < kCount; ++i) result.v[i] = scalar_t(values[i][0]);
    store_vec<kCount>(row, result);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      Vec<scalar_t, kVec> result;
#pragma unroll
      for (int v = 0; v < kVec; ++v) result.v[v] = scalar_t(values[i][v]);
      if (valid >> i & 1) store_vec<kVec>(row, result);
      row += step;
    }
  }
}

// Those of `count` rows from row `first` of a map on that lie inside it, without the first `skipped`; counted from `first`.
struct RowRange {
  int begin;
  unsigned count;
  __device__ bool has(int row) const { return unsigned(row - begin) < count; }
};
__device__ inline RowRange rows_inside(int64_t first, int count, int64_t height, int skipped = 0) {
  const int64_t begin = first + skipped < 0 ? -first : skipped, end = first + count < height ? count : height - first;
  return {int(begin), unsigned(begin < end ? end - begin : 0)};
}

// Reads the columns of one row of a map after the other. `kAhead` loads the next row before this one's arithmetic, which then hides the
// latency; the loaded columns stay in the storage dtype, and so take few registers.
template <int kBefore, int kWide, int kCount, int kVec, bool kSteps, bool kAhead, typename scalar_t>
class Rows {
 public:
  __device__ Rows(const scalar_t* first, RowRange there, int64_t row_step, unsigned valid, int64_t column_step)
      : row_(first), there_(there), row_step_(row_step), column_step_(column_step), valid_(valid) {
    if constexpr (kAhead) load();
  }
  // The next row's; false, and nothing, where it does not exist. `kExists`: it is known to.
  template <bool kExists = false, typename A>
  __device__ bool next(A (&values)[kCount][kVec]) {
    const bool exists = kExists || there_.has(index_);
    if (exists) {
      if constexpr (kAhead) {
        ahead_.unpack_to(values);
      } else {
        Held now;
        now.load(row_, valid_, column_step_);
        now.unpack_to(values);
      }
    }
    ++index_;
    row_ += row_step_;
    if constexpr (kAhead) load();
    return exists;
  }

 private:
  using Held = Columns<kBefore, kWide, kCount, kVec, kSteps, scalar_t>;
  __device__ void load() {
    if (there_.has(index_)) ahead_.load(row_, valid_, column_step_);
  }

  const scalar_t* row_;
  RowRange there_;
  int64_t row_step_, column_step_;
  unsigned valid_;
  int index_ = 0;
  Held ahead_;
};

// Pairs of channels of a block's threads.
EF_HD int pairs_of_block(int64_t pairs) { return pairs < kThreads ? int(pairs) : kThreads; }

// Values i and i + 1, as those of maps are packed.
template <bool kFull, typename scalar_t>
__device__ Packed<scalar_t, 2> load_two(const Parameter<scalar_t>& values, int i) {
  if constexpr (kFull) {
    const auto wide = load_vec<2>(static_cast<const acc_t<scalar_t>*>(values.data) + i);
    const Vec<scalar_t, 2> rounded{scalar_t(wide.v[0]), scalar_t(wide.v[1])};
    Packed<scalar_t, 2> result;
    std::memcpy(&result, &rounded, sizeof(result));
    return result;
  } else {
    return load_packed<2>(static_cast<const scalar_t*>(values.data) + i);
  }
}

// The filter of the `group`-th kVec channels. Threads with pairs of channels lie along the pairs, from `first` on and all over again behind
// the last of `pairs`: their block reads its filters side by side, and a thread takes its own from shared memory, where it is an odd
// number of words and meets no other in a bank. For all threads of the block.
// `kUnpack`: it stays in registers as numbers, and not in half as many words that are unpacked in each row: fewer instructions.
template <int kKernel, int kVec, bool kUnpack, typename scalar_t, typename A>
__device__ void load_filter(const Parameter<scalar_t>& weight, int group, int first, int pairs, A (&filter)[kKernel][kKernel][kVec]) {
  constexpr int kTaps = kKernel * kKernel;
  if constexpr (kVec == 1) {
#pragma unroll
    for (int t = 0; t < kTaps; ++t) filter[t / kKernel][t % kKernel][0] = weight[int64_t(group) * kTaps + t];
  } else {
    Packed<scalar_t, 2>* shared = shared_memory<Packed<scalar_t, 2>>();  // [pairs_of_block, taps]
    const int last = pairs_of_block(pairs) * kTaps - 1;
    const auto stage = [&]<bool kFull>() {
      Packed<scalar_t, 2> two[kTaps];
#pragma unroll
      for (int k = 0; k < kTaps; ++k) {
        const int i = first * kTaps + min(k * kThreads + int(threadIdx.x), last);
        two[k] = load_two<kFull>(weight, 2 * (i < pairs * kTaps ? i : i - pairs * kTaps));
      }
#pragma unroll
      for (int k = 0; k < kTaps; ++k) shared[min(k * kThreads + int(threadIdx.x), last)] = two[k];
    };
    sizeof(scalar_t) == 2 && weight.full ? stage.template operator()<sizeof(scalar_t) == 2>() : stage.template operator()<false>();
    __syncthreads();
    shared += int(threadIdx.x) % pairs_of_block(pairs) * kTaps;
#pragma unroll
    for (int k = 0; k < kTaps; ++k) {
      A values[2];
      unpack(shared[k], values);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int t = (2 * k + j) % kTaps;
        filter[t / kKernel][t % kKernel][(2 * k + j) / kTaps] = kUnpack ? kept(values[j]) : values[j];
      }
    }
  }
}
}  // namespace ef::depthwise_conv
