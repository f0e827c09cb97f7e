// The arithmetic of the CPU kernels, on staged rows [column][lane]: a tile is some columns of one row times one vector of lanes, with its
// sums in registers. Enough sums to hide the latency of the multiply-add, few enough to stay in the 16 registers of AVX2. Processors with
// AVX-512 take twice as many lanes at once where the lanes allow it.
#pragma once
#include <algorithm>

#include "../common/vector.h"
#include "depthwise_conv_math.h"

namespace ef::depthwise_conv {
constexpr int kTileColumns = 8;
constexpr int kCorrelateColumns = 16;  // worked on lane after lane: their rows stay in the first-level cache

// Loops for all of a tile's cases take long to compile; double, which only gradient checks use, has the most general ones.
template <typename A>
inline constexpr bool kFewLoops = std::is_same_v<A, double>;

// Prefetch addresses for the next row, `bytes` for each value of this one. Each tile asks for its share, so that the memory comes while
// the processor computes: the rows are too many streams for the hardware prefetcher.
struct Prefetch {
  const char* data = nullptr;
  int64_t bytes = 0;
  template <bool kWrite>
  EF_HD void ask(int64_t first, int64_t count) const {
    for (int64_t i = first * bytes; i < (first + count) * bytes; i += 64) __builtin_prefetch(data + i, kWrite);
  }
};

// out[j] = init + sum over r, t of in[r][j kStep + offset + t] * filter[r][t], for every lane of the columns j.
template <typename A>
struct ConvolveJob {
  const A* in[5];      // [in_columns][in_step], only the rows inside the image
  const A* filter[5];  // [tap][lanes]
  int rows;
  const A* init;  // [lanes], or null
  A* out;         // [columns][out_step]
  A* out_below;   // null, or of the next result, which reads in[1] to in[rows]
  int64_t lanes, in_step, out_step;
  int64_t offset, columns, in_columns;
  Prefetch prefetch_in[2];  // for each of kStep rows, or of two results
  Prefetch prefetch_out;    // of one result; for two it costs more than it saves
};

// Two results at once share most of what they read. AVX-512 has registers for the sums of both and a filter of 3 x 3.
template <typename A>
bool can_pair(int kernel, int step) {
  return kernel == 3 && step == 1 && !kFewLoops<A> && has_avx512();
}

// A tap outside the row adds nothing, not even zero times the filter; only checked tiles have such taps.
template <int kTaps, int kColumns, bool kChecked, typename V, typename A>
EF_HD void convolve_pair(const ConvolveJob<A>& job, int64_t column, int64_t lane) {
  const int64_t start = column + job.offset;
  V sum[2][kColumns], w[kTaps][kTaps];
  const V init = job.init ? load<V>(job.init + lane) : V{};
#pragma GCC unroll 16
  for (int j = 0; j < kColumns; ++j) sum[0][j] = sum[1][j] = init;
#pragma GCC unroll 16
  for (int r = 0; r <= kTaps; ++r) {
#pragma GCC unroll 16
    for (int t = 0; r < kTaps && t < kTaps; ++t) w[r][t] = load<V>(job.filter[r] + t * job.lanes + lane);
    const A* in = job.in[r] + start * job.in_step + lane;
#pragma GCC unroll 32
    for (int i = 0; i < kColumns - 1 + kTaps; ++i, in += job.in_step) {
      if (kChecked && (start + i < 0 || start + i >= job.in_columns)) continue;
      const V x = load<V>(in);
#pragma GCC unroll 16
      for (int j = 0; j < kColumns; ++j) {
        const int t = i - j;
        if (t < 0 || t >= kTaps) continue;
        if (r < kTaps) sum[0][j] += x * w[r][t];
        if (r > 0) sum[1][j] += x * w[r - 1][t];
      }
    }
  }
  const int64_t first = column * job.out_step + lane;
#pragma GCC unroll 16
  for (int j = 0; j < kColumns; ++j) {
    store<V>(job.out + first + j * job.out_step, sum[0][j]);
    store<V>(job.out_below + first + j * job.out_step, sum[1][j]);
  }
}

template <int kTaps, int kStep, int kColumns, bool kChecked, bool kPair, typename V, typename A>
EF_HD void convolve_tile(const ConvolveJob<A>& job, int64_t column, int64_t lane) {
  if constexpr (kPair) return convolve_pair<kTaps, kColumns, kChecked, V>(job, column, lane);
  const int64_t start = column * kStep + job.offset;
  V sum[kColumns];
  const V init = job.init ? load<V>(job.init + lane) : V{};
#pragma GCC unroll 16
  for (int j = 0; j < kColumns; ++j) sum[j] = init;
  for (int r = 0; r < job.rows; ++r) {
    V w[kTaps];
#pragma GCC unroll 16
    for (int t = 0; t < kTaps; ++t) w[t] = load<V>(job.filter[r] + t * job.lanes + lane);
    const A* in = job.in[r] + start * job.in_step + lane;
#pragma GCC unroll 32
    for (int i = 0; i < (kColumns - 1) * kStep + kTaps; ++i, in += job.in_step) {
      if (kChecked && (start + i < 0 || start + i >= job.in_columns)) continue;
      const V x = load<V>(in);
#pragma GCC unroll 16
      for (int j = 0; j < kColumns; ++j) {
        const int t = i - j * kStep;
        if (t >= 0 && t < kTaps) sum[j] += x * w[t];
      }
    }
  }
  A* out = job.out + column * job.out_step + lane;
#pragma GCC unroll 16
  for (int j = 0; j < kColumns; ++j) store<V>(out + j * job.out_step, sum[j]);
}

// A row is cut into tiles of eight columns, a rest of up to four of them into one of four; the last tile may overlap the one before.
template <int kTaps, int kStep, bool kPair, typename V, typename A>
EF_HD void convolve_tiles(const ConvolveJob<A>& job) {
  constexpr int kNarrow = kFewLoops<A> ? 1 : 4;
  for (int64_t j = 0; j < job.columns;) {
    const int64_t left = job.columns - j;
    const int64_t width = left > kNarrow && job.columns >= kTileColumns ? kTileColumns : job.columns >= kNarrow ? kNarrow : 1;
    const int64_t column = std::min(j, job.columns - width), start = column * kStep + job.offset;
    const bool inside = !kFewLoops<A> && start >= 0 && start + (width - 1) * kStep + kTaps <= job.in_columns;
    for (int64_t lane = 0; lane < job.lanes; lane += kLanes<V, A>) {
      const int64_t first = column * job.lanes + lane * width, count = width * kLanes<V, A>;
      for (int i = 0; i < (kPair ? 2 : kStep); ++i) job.prefetch_in[i].template ask<false>(first, count);
      if (!kPair) job.prefetch_out.template ask<true>(first, count);
      if (width == kTileColumns) {
        inside ? convolve_tile<kTaps, kStep, kTileColumns, kFewLoops<A>, kPair, V>(job, column, lane)
               : convolve_tile<kTaps, kStep, kTileColumns, true, kPair, V>(job, column, lane);
      } else if (width == kNarrow) {
        convolve_tile<kTaps, kStep, kNarrow, true, kPair, V>(job, column, lane);
      } else {
        convolve_tile<kTaps, kStep, 1, true, kPair, V>(job, column, lane);
      }
    }
    j = column + width;
  }
}

template <int kTaps, int kStep, bool kPair, typename A>
EF_CPU_AVX512 void convolve_row_avx512(const ConvolveJob<A>& job) {
  using Wide = typename WideVectorOf<A>::type;
  if (job.lanes % kLanes<Wide, A> == 0) return convolve_tiles<kTaps, kStep, kPair, Wide>(job);
  convolve_tiles<kTaps, kStep, kPair, typename VectorOf<A>::type>(job);
}
template <int kTaps, int kStep, typename A>
EF_CPU_CLONES_TO_AVX2 void convolve_row(const ConvolveJob<A>& job) {
  convolve_tiles<kTaps, kStep, false, typename VectorOf<A>::type>(job);
}

template <typename A>
void convolve(int taps, int step, const ConvolveJob<A>& job) {
  const auto run = [&]<int kTaps, int kStep>() {
    if constexpr (!kFewLoops<A>) {
      if (has_avx512()) return convolve_row_avx512<kTaps, kStep, false>(job);
    }
    convolve_row<kTaps, kStep>(job);
  };
  if constexpr (!kFewLoops<A>) {
    if (job.out_below) return convolve_row_avx512<3, 1, true>(job);
  }
  if (step == 2) return taps == 3 ? run.template operator()<3, 2>() : run.template operator()<5, 2>();
  if (taps == 1) return run.template operator()<1, 1>();
  if (taps == 2) return run.template operator()<2, 1>();
  return taps == 3 ? run.template operator()<3, 1>() : run.template operator()<5, 1>();
}

// sums[r][t] += sum over j of grad[j] * in[r][j kStep + offset + t], for every lane.
template <typename A>
struct CorrelateJob {
  const A* grad;   // [columns][grad_step]
  const A* in[5];  // [in_columns][in_step], only the rows inside the image
  A* sums[5];      // [tap][lanes]
  int rows;
  A* bias_sums;  // [lanes], or null
  int64_t lanes, grad_step, in_step;
  int64_t offset, columns, in_columns;
  Prefetch prefetch_in[2], prefetch_grad;
};

template <int kTaps, int kStep, int kRows, int kColumns, bool kChecked, typename V, typename A>
EF_HD void correlate_tile(const CorrelateJob<A>& job, int row, int64_t column, int64_t lane, V (&sum)[kRows][kTaps]) {
  const int64_t start = column * kStep + job.offset;
  V g[kColumns];
#pragma GCC unroll 16
  for (int j = 0; j < kColumns; ++j) g[j] = load<V>(job.grad + (column + j) * job.grad_step + lane);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    const A* in = job.in[row + r] + start * job.in_step + lane;
#pragma GCC unroll 32
    for (int i = 0; i < (kColumns - 1) * kStep + kTaps; ++i, in += job.in_step) {
      if (kChecked && (start + i < 0 || start + i >= job.in_columns)) continue;
      const V x = load<V>(in);
#pragma GCC unroll 16
      for (int j = 0; j < kColumns; ++j) {
        const int t = i - j * kStep;
        if (t >= 0 && t < kTaps) sum[r][t] += g[j] * x;
      }
    }
  }
}

template <int kTaps, int kStep, int kRows, typename V, typename A>
EF_HD void correlate_rows(const CorrelateJob<A>& job, int row, int64_t j, int64_t last, int64_t lane) {
  constexpr int kColumns = 4;
  V sum[kRows][kTaps];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int t = 0; t < kTaps; ++t) sum[r][t] = load<V>(job.sums[row + r] + t * job.lanes + lane);
  }
  while (j < last) {
    const int64_t start = j * kStep + job.offset;
    if (j + kColumns <= last) {
      const bool inside = !kFewLoops<A> && start >= 0 && start + (kColumns - 1) * kStep + kTaps <= job.in_columns;
      inside ? correlate_tile<kTaps, kStep, kRows, kColumns, kFewLoops<A>, V>(job, row, j, lane, sum)
             : correlate_tile<kTaps, kStep, kRows, kColumns, true, V>(job, row, j, lane, sum);
      j += kColumns;
    } else {
      correlate_tile<kTaps, kStep, kRows, 1, true, V>(job, row, j++, lane, sum);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int t = 0; t < kTaps; ++t) store<V>(job.sums[row + r] + t * job.lanes + lane, sum[r][t]);
  }
}

template <int kTaps, int kStep, typename V, typename A>
EF_HD void correlate_tiles(const CorrelateJob<A>& job) {
  constexpr int kRows = kFewLoops<A> ? 1 : kTaps == 3 ? 3 : 2;  // as many as have their sums in registers
  for (int64_t first = 0; first < job.columns; first += kCorrelateColumns) {
    const int64_t last = std::min(job.columns, first + kCorrelateColumns), width = last - first;
    for (int64_t lane = 0; lane < job.lanes; lane += kLanes<V, A>) {
      const int64_t share = first * job.lanes + lane * width, count = width * kLanes<V, A>;
      for (int i = 0; i < kStep; ++i) job.prefetch_in[i].template ask<false>(share, count);
      job.prefetch_grad.template ask<false>(share, count);
      int row = 0;
      for (; row + kRows <= job.rows; row += kRows) correlate_rows<kTaps, kStep, kRows, V>(job, row, first, last, lane);
      for (; row < job.rows; ++row) correlate_rows<kTaps, kStep, 1, V>(job, row, first, last, lane);
      if (job.bias_sums) {
        V sum = load<V>(job.bias_sums + lane);
        for (int64_t j = first; j < last; ++j) sum += load<V>(job.grad + j * job.grad_step + lane);
        store<V>(job.bias_sums + lane, sum);
      }
    }
  }
}

template <int kTaps, int kStep, typename A>
EF_CPU_AVX512 void correlate_row_avx512(const CorrelateJob<A>& job) {
  using Wide = typename WideVectorOf<A>::type;
  if (job.lanes % kLanes<Wide, A> == 0) return correlate_tiles<kTaps, kStep, Wide>(job);
  correlate_tiles<kTaps, kStep, typename VectorOf<A>::type>(job);
}
template <int kTaps, int kStep, typename A>
EF_CPU_CLONES_TO_AVX2 void correlate_row(const CorrelateJob<A>& job) {
  correlate_tiles<kTaps, kStep, typename VectorOf<A>::type>(job);
}

template <typename A>
void correlate(int taps, int step, const CorrelateJob<A>& job) {
  const auto run = [&]<int kTaps, int kStep>() {
    if constexpr (!kFewLoops<A>) {
      if (has_avx512()) return correlate_row_avx512<kTaps, kStep>(job);
    }
    correlate_row<kTaps, kStep>(job);
  };
  if (step == 1) return taps == 3 ? run.template operator()<3, 1>() : run.template operator()<5, 1>();
  return taps == 3 ? run.template operator()<3, 2>() : run.template operator()<5, 2>();
}
}  // namespace ef::depthwise_conv
