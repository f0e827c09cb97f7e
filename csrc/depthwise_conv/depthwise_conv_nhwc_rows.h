// Loops of the channels-last CPU kernels over one row of results. A tile is a few columns of one row times one vector of channels, with
// its sums in registers; the loop over channels is inside the loop over columns, so that a tile's neighbours find their input in the
// cache. Columns whose filter leaves the image are done one by one.
#pragma once
#include "depthwise_conv_cpu.h"

namespace ef::depthwise_conv {
constexpr int kMaxRows = 5;

// For the columns j to do: out[j] = init + sum over r, t of in[r][j kStep + offset + t] * filter[r][t], for every channel.
template <typename A>
struct ConvolveJob {
  const A* in[kMaxRows];      // [in_columns][channels], only the rows inside the image
  const A* filter[kMaxRows];  // [tap][channels]
  int rows;
  const A* init;                                                    // [channels], or null
  A* out;                                                           // [columns][channels]
  int64_t in_step, filter_step, out_step;                           // from one column or tap to the next
  int64_t offset, first_column, last_column, in_columns, channels;  // the columns j to do
};

// Columns [first, last) have all their taps inside the image.
struct Interior {
  int64_t first, last;
  Interior(int64_t offset, int taps, int step, int64_t in_columns) {
    const int64_t room = in_columns - taps - offset;
    first = offset < 0 ? ceil_div(-offset, step) : 0;
    last = room < 0 ? 0 : room / step + 1;
  }
};

template <int kTaps, int kStep, int kColumns, typename V, typename A>
EF_HD void convolve_tile(const ConvolveJob<A>& job, int64_t column, int64_t c) {
  V sum[kColumns];
  const V init = job.init ? load<V>(job.init + c) : V{};
#pragma GCC unroll 16
  for (int j = 0; j < kColumns; ++j) sum[j] = init;
  for (int r = 0; r < job.rows; ++r) {
    V w[kTaps];
#pragma GCC unroll 16
    for (int t = 0; t < kTaps; ++t) w[t] = load<V>(job.filter[r] + t * job.filter_step + c);
    const A* in = job.in[r] + (column * kStep + job.offset) * job.in_step + c;
#pragma GCC unroll 32
    for (int i = 0; i < (kColumns - 1) * kStep + kTaps; ++i) {
      const V x = load<V>(in);
      in += job.in_step;
#pragma GCC unroll 16
      for (int j = 0; j < kColumns; ++j) {
        const int t = i - j * kStep;
        if (t >= 0 && t < kTaps) sum[j] += x * w[t];
      }
    }
  }
  A* out = job.out + column * job.out_step + c;
#pragma GCC unroll 16
  for (int j = 0; j < kColumns; ++j) store<V>(out + j * job.out_step, sum[j]);
}

// Asks for a share of what comes next and is in no cache yet, `count` of the newest row's values: the tiles read and write too many
// streams for the processor to foresee. Doubles the speed of what does not fit in the cache.
template <int kCount, bool kWrite, typename A>
EF_HD void prefetch(const A* p) {
#pragma GCC unroll 64
  for (int i = 0; i < kCount; i += 64 / int(sizeof(A))) __builtin_prefetch(p + i, kWrite);
}

template <int kStep, int kColumns, typename V, typename A>
EF_HD void prefetch_next_tile(const ConvolveJob<A>& job, int64_t column, int64_t c) {
  constexpr int kCount = kLanes<V, A> * kColumns * kStep;
  const int64_t in = (column * kStep + job.offset + 2) * job.in_step + c * kColumns * kStep;
#pragma GCC unroll 16
  for (int r = std::max(0, job.rows - kStep); r < job.rows; ++r) prefetch<kCount, false>(job.in[r] + in);
  prefetch<kLanes<V, A> * kColumns, true>(job.out + column * job.out_step + c * kColumns);
}

template <int kTaps, int kStep, typename V, typename A>
EF_HD void convolve_border(const ConvolveJob<A>& job, int64_t column, int64_t c) {
  const int64_t start = column * kStep + job.offset;
  const int64_t first = std::max<int64_t>(0, -start), last = std::min<int64_t>(kTaps, job.in_columns - start);
  V sum = job.init ? load<V>(job.init + c) : V{};
  for (int r = 0; r < job.rows; ++r) {
    for (int64_t t = first; t < last; ++t)
      sum += load<V>(job.in[r] + (start + t) * job.in_step + c) * load<V>(job.filter[r] + t * job.filter_step + c);
  }
  store<V>(job.out + column * job.out_step + c, sum);
}

template <int kTaps, int kStep, typename A>
EF_CPU_CLONES void convolve_row(const ConvolveJob<A>& job) {
  using V = typename VectorOf<A>::type;
  constexpr int kColumns = 6;
  const Interior interior(job.offset, kTaps, kStep, job.in_columns);
  const int64_t last = std::min(interior.last, job.last_column);
  int64_t j = job.first_column;
  while (j < job.last_column) {
    int64_t c = 0;
    if (j < interior.first || j >= last) {
      for (; c + kLanes<V, A> <= job.channels; c += kLanes<V, A>) convolve_border<kTaps, kStep, V>(job, j, c);
      for (; c < job.channels; ++c) convolve_border<kTaps, kStep, A>(job, j, c);
      ++j;
    } else if (j + kColumns <= last) {
      for (; c + kLanes<V, A> <= job.channels; c += kLanes<V, A>) {
        prefetch_next_tile<kStep, kColumns, V>(job, j + kColumns, c);
        convolve_tile<kTaps, kStep, kColumns, V>(job, j, c);
      }
      for (; c < job.channels; ++c) convolve_tile<kTaps, kStep, kColumns, A>(job, j, c);
      j += kColumns;
    } else if (j + 2 <= last) {
      for (; c + kLanes<V, A> <= job.channels; c += kLanes<V, A>) convolve_tile<kTaps, kStep, 2, V>(job, j, c);
      for (; c < job.channels; ++c) convolve_tile<kTaps, kStep, 2, A>(job, j, c);
      j += 2;
    } else {
      for (; c + kLanes<V, A> <= job.channels; c += kLanes<V, A>) convolve_tile<kTaps, kStep, 1, V>(job, j, c);
      for (; c < job.channels; ++c) convolve_tile<kTaps, kStep, 1, A>(job, j, c);
      ++j;
    }
  }
}

template <typename A>
void convolve(int taps, int step, const ConvolveJob<A>& job) {
  if (step == 2) return taps == 3 ? convolve_row<3, 2>(job) : convolve_row<5, 2>(job);
  if (taps == 1) return convolve_row<1, 1>(job);
  if (taps == 2) return convolve_row<2, 1>(job);
  return taps == 3 ? convolve_row<3, 1>(job) : convolve_row<5, 1>(job);
}

// sums[r][t] += sum over j of grad[j] * in[r][j kStep + offset + t], for every channel.
template <typename A>
struct CorrelateJob {
  const A* grad;          // [columns][channels]
  const A* in[kMaxRows];  // [in_columns][channels], only the rows inside the image
  A* sums[kMaxRows];      // [tap][channels]
  int rows;
  A* bias_sums;  // [channels], or null
  int64_t grad_step, in_step, sums_step;
  int64_t offset, first_column, last_column, in_columns, channels;  // the columns j to do
};

template <int kTaps, int kStep, int kRows, typename V, typename A>
EF_HD void correlate_border(const CorrelateJob<A>& job, int row, int64_t first, int64_t last, int64_t c, V (&sum)[kRows][kTaps]) {
  for (int64_t j = first; j < last; ++j) {
    const V g = load<V>(job.grad + j * job.grad_step + c);
    const int64_t start = j * kStep + job.offset;
#pragma GCC unroll 16
    for (int t = 0; t < kTaps; ++t) {
      if (start + t < 0 || start + t >= job.in_columns) continue;
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) sum[r][t] += g * load<V>(job.in[row + r] + (start + t) * job.in_step + c);
    }
  }
}

template <int kTaps, int kStep, int kRows, int kColumns, typename V, typename A>
EF_HD void correlate_tile(const CorrelateJob<A>& job, int row, int64_t column, int64_t c, V (&sum)[kRows][kTaps]) {
  V g[kColumns];
#pragma GCC unroll 16
  for (int j = 0; j < kColumns; ++j) g[j] = load<V>(job.grad + (column + j) * job.grad_step + c);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    const A* in = job.in[row + r] + (column * kStep + job.offset) * job.in_step + c;
#pragma GCC unroll 32
    for (int i = 0; i < (kColumns - 1) * kStep + kTaps; ++i) {
      const V x = load<V>(in);
      in += job.in_step;
#pragma GCC unroll 16
      for (int j = 0; j < kColumns; ++j) {
        const int t = i - j * kStep;
        if (t >= 0 && t < kTaps) sum[r][t] += g[j] * x;
      }
    }
  }
}

// One vector of channels over the columns [first, last).
template <int kTaps, int kStep, int kRows, typename V, typename A>
EF_HD void correlate_columns(const CorrelateJob<A>& job, int row, const Interior& interior, int64_t first, int64_t last, int64_t c) {
  V sum[kRows][kTaps] = {};
  const int64_t inner = std::clamp(interior.first, first, last), outer = std::clamp(interior.last, inner, last);
  correlate_border<kTaps, kStep, kRows, V>(job, row, first, inner, c, sum);
  int64_t j = inner;
  for (; j + 4 <= outer; j += 4) correlate_tile<kTaps, kStep, kRows, 4, V>(job, row, j, c, sum);
  for (; j < outer; ++j) correlate_tile<kTaps, kStep, kRows, 1, V>(job, row, j, c, sum);
  correlate_border<kTaps, kStep, kRows, V>(job, row, outer, last, c, sum);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int t = 0; t < kTaps; ++t) {
      A* p = job.sums[row + r] + t * job.sums_step + c;
      store<V>(p, load<V>(p) + sum[r][t]);
    }
  }
}

template <int kTaps, int kStep, typename A>
EF_CPU_CLONES void correlate_row(const CorrelateJob<A>& job) {
  using V = typename VectorOf<A>::type;
  constexpr int kRows = kTaps == 3 ? 3 : 2;  // as many as have their sums in registers
  constexpr int kBlockColumns = 16;          // keeps their rows in the first-level cache while the channels go by
  const Interior interior(job.offset, kTaps, kStep, job.in_columns);
  for (int64_t first = job.first_column; first < job.last_column; first += kBlockColumns) {
    const int64_t last = std::min(job.last_column, first + kBlockColumns);
    int64_t c = 0;
    for (; c + kLanes<V, A> <= job.channels; c += kLanes<V, A>) {
      prefetch<kLanes<V, A> * kBlockColumns, false>(job.grad + last * job.grad_step + c * kBlockColumns);
      for (int r = std::max(0, job.rows - kStep); r < job.rows; ++r) {
        const int64_t in = (last * kStep + job.offset + 2) * job.in_step + c * kBlockColumns * kStep;
        prefetch<kLanes<V, A> * kBlockColumns * kStep, false>(job.in[r] + in);
      }
      int row = 0;
      for (; row + kRows <= job.rows; row += kRows) correlate_columns<kTaps, kStep, kRows, V>(job, row, interior, first, last, c);
      for (; row < job.rows; ++row) correlate_columns<kTaps, kStep, 1, V>(job, row, interior, first, last, c);
      if (job.bias_sums) {
        V sum = {};
        for (int64_t j = first; j < last; ++j) sum += load<V>(job.grad + j * job.grad_step + c);
        store<V>(job.bias_sums + c, load<V>(job.bias_sums + c) + sum);
      }
    }
    for (; c < job.channels; ++c) {
      for (int row = 0; row < job.rows; ++row) correlate_columns<kTaps, kStep, 1, A>(job, row, interior, first, last, c);
      if (job.bias_sums) {
        A sum = 0;
        for (int64_t j = first; j < last; ++j) sum += job.grad[j * job.grad_step + c];
        job.bias_sums[c] += sum;
      }
    }
  }
}

template <typename A>
void correlate(int taps, int step, const CorrelateJob<A>& job) {
  if (step == 1) return taps == 3 ? correlate_row<3, 1>(job) : correlate_row<5, 1>(job);
  return taps == 3 ? correlate_row<3, 2>(job) : correlate_row<5, 2>(job);
}

// out[column][channel] = prologue(in), converted.
template <Activation kPrologue, typename scalar_t, typename A>
EF_CPU_CLONES void load_row(const scalar_t* __restrict in, int64_t in_step, A* __restrict out, int64_t columns, int64_t channels) {
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t c = 0; c < channels; ++c) out[j * channels + c] = activate<kPrologue>(A(in[j * in_step + c]));
  }
}

// out = value, converted, times the derivative of the prologue at x. `value` may be `out` itself.
template <Activation kPrologue, typename scalar_t, typename A>
EF_CPU_CLONES void finish_row(const A* value, int64_t value_step, const scalar_t* x, scalar_t* out, int64_t step, int64_t first_column,
                              int64_t last_column, int64_t channels) {
  for (int64_t j = first_column; j < last_column; ++j) {
#pragma GCC ivdep
    for (int64_t c = 0; c < channels; ++c) {
      A v = value[j * value_step + c];
      if constexpr (kPrologue != Activation::kNone) v *= activate_grad<kPrologue>(A(x[j * step + c]));
      out[j * step + c] = scalar_t(v);
    }
  }
}
}  // namespace ef::depthwise_conv
