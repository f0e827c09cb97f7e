// Rows of a tensor staged in scratch memory and back, for the CPU kernels: as [column][lane], a lane per channel of a group, in
// acc_t, with the prologue applied. One set of loops (depthwise_conv_tiles.h) so serves both layouts and every dtype: NCHW is
// transposed on the way, in blocks of a vector.
#pragma once
#include <algorithm>
#include <utility>

#include "../common/parallel.h"
#include "../common/vector.h"
#include "depthwise_conv.h"
#include "depthwise_conv_tiles.h"

namespace ef::depthwise_conv {
// Staged rows have a multiple of eight lanes; those without a channel hold zeros.
constexpr int64_t kLaneMultiple = 8;
constexpr int64_t lanes_of(int64_t channels) { return ceil_div(channels, kLaneMultiple) * kLaneMultiple; }
constexpr int kMaxRows = 5;

// The columns and channels that a block needs, of all rows of a tensor.
template <typename scalar_t>
struct View {
  using A = acc_t<std::remove_const_t<scalar_t>>;
  scalar_t* data;
  int64_t image_step, row_step, column_step, channel_step, rows, columns, channels;
  scalar_t* row(int64_t n, int64_t y) const { return data + n * image_step + y * row_step; }
  // Row y where it is one piece of memory; `reach` of its columns for each of the staged row it is asked for with.
  Prefetch prefetch(int64_t n, int64_t y, int reach) const {
    const bool whole = channel_step == 1 && channels == column_step && y < rows;
    return whole ? Prefetch{reinterpret_cast<const char*>(row(n, y)), reach * int64_t(sizeof(scalar_t))} : Prefetch{};
  }
  // Whether its rows are as if staged; and such a row.
  bool is_staged() const { return std::is_same_v<std::remove_const_t<scalar_t>, A> && channel_step == 1 && channels % kLaneMultiple == 0; }
  auto* staged(int64_t n, int64_t y) const {
    using Staged = std::conditional_t<std::is_const_v<scalar_t>, const A, A>;
    return reinterpret_cast<Staged*>(row(n, y));
  }
  int64_t lanes() const { return lanes_of(channels); }
};

// Swaps blocks of kSize lanes between two rows: the second half of each pair of blocks of a with the first half of b's.
template <int kSize, typename V, size_t... kLane>
EF_HD void swap_blocks(V& a, V& b, std::index_sequence<kLane...>) {
  constexpr int kCount = sizeof...(kLane);
  const V low = __builtin_shufflevector(a, b, (kLane & kSize ? kCount + kLane - kSize : kLane)...);
  b = __builtin_shufflevector(a, b, (kLane & kSize ? kCount + kLane : kLane + kSize)...);
  a = low;
}
template <int kSize, typename V, int kCount>
EF_HD void transpose(V (&rows)[kCount]) {
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) {
    if (!(i & kSize)) swap_blocks<kSize>(rows[i], rows[i + kSize], std::make_index_sequence<kCount>());
  }
  if constexpr (kSize > 1) transpose<kSize / 2>(rows);
}

template <typename scalar_t, typename A>
EF_CPU_CLONES void load_pixels(const scalar_t* in, int64_t in_step, int64_t columns, int64_t channels, A* staged, int64_t lanes) {
  using V = typename VectorOf<A>::type;
  for (int64_t j = 0; j < columns; ++j, in += in_step, staged += lanes) {
    int64_t c = 0;
    for (; c + kLanes<V, A> <= channels; c += kLanes<V, A>) store(staged + c, load(in + c));
    for (; c < lanes; ++c) staged[c] = c < channels ? A(in[c]) : A(0);
  }
}

template <typename scalar_t, typename A>
EF_CPU_CLONES void load_planes(const scalar_t* in, int64_t plane, int64_t columns, int64_t channels, A* staged, int64_t lanes) {
  using V = typename VectorOf<A>::type;
  constexpr int kBlock = kLanes<V, A>;
  for (int64_t c = 0; c < lanes; c += kBlock, in += kBlock * plane, staged += kBlock) {
    const bool whole = c + kBlock <= channels && columns >= kBlock;
    for (int64_t first = 0; whole && first < columns; first += kBlock) {
      const int64_t j = std::min(first, columns - kBlock);
      V block[kBlock];
#pragma GCC unroll 16
      for (int i = 0; i < kBlock; ++i) block[i] = load(in + i * plane + j);
      transpose<kBlock / 2>(block);
#pragma GCC unroll 16
      for (int i = 0; i < kBlock; ++i) store(staged + (j + i) * lanes, block[i]);
    }
    for (int i = 0; !whole && i < kBlock; ++i) {
      for (int64_t j = 0; j < columns; ++j) staged[j * lanes + i] = c + i < channels ? A(in[i * plane + j]) : A(0);
    }
  }
}

template <typename scalar_t, typename A>
EF_CPU_CLONES void store_pixels(const A* staged, int64_t lanes, scalar_t* out, int64_t out_step, int64_t columns, int64_t channels) {
  using V = typename VectorOf<A>::type;
  for (int64_t j = 0; j < columns; ++j, out += out_step, staged += lanes) {
    int64_t c = 0;
    for (; c + kLanes<V, A> <= channels; c += kLanes<V, A>) store(out + c, load(staged + c));
    for (; c < channels; ++c) out[c] = scalar_t(staged[c]);
  }
}

template <typename scalar_t, typename A>
EF_CPU_CLONES void store_planes(const A* staged, int64_t lanes, scalar_t* out, int64_t plane, int64_t columns, int64_t channels) {
  using V = typename VectorOf<A>::type;
  constexpr int kBlock = kLanes<V, A>;
  for (int64_t c = 0; c < channels; c += kBlock, out += kBlock * plane, staged += kBlock) {
    const bool whole = c + kBlock <= channels && columns >= kBlock;
    for (int64_t first = 0; whole && first < columns; first += kBlock) {
      const int64_t j = std::min(first, columns - kBlock);
      V block[kBlock];
#pragma GCC unroll 16
      for (int i = 0; i < kBlock; ++i) block[i] = load(staged + (j + i) * lanes);
      transpose<kBlock / 2>(block);
#pragma GCC unroll 16
      for (int i = 0; i < kBlock; ++i) store(out + i * plane + j, block[i]);
    }
    for (int i = 0; !whole && i < kBlock && c + i < channels; ++i) {
      for (int64_t j = 0; j < columns; ++j) out[i * plane + j] = scalar_t(staged[j * lanes + i]);
    }
  }
}

template <Activation kPrologue, typename A>
EF_CPU_CLONES void activate_row(A* staged, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) staged[i] = activate<kPrologue>(staged[i]);
}

// The gradient for x from that for its prologue.
template <Activation kPrologue, typename A>
EF_CPU_CLONES void unactivate_row(A* __restrict staged, const A* __restrict x, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) staged[i] = activate_backward<kPrologue>(staged[i], x[i]);
}

template <typename scalar_t>
void stage(const View<const scalar_t>& view, int64_t n, int64_t y, acc_t<scalar_t>* staged) {
  if (view.channel_step == 1) {
    load_pixels(view.row(n, y), view.column_step, view.columns, view.channels, staged, view.lanes());
  } else {
    load_planes(view.row(n, y), view.channel_step, view.columns, view.channels, staged, view.lanes());
  }
}

template <typename scalar_t>
void unstage(const View<scalar_t>& view, int64_t n, int64_t y, const acc_t<scalar_t>* staged) {
  if (view.channel_step == 1) {
    store_pixels(staged, view.lanes(), view.row(n, y), view.column_step, view.columns, view.channels);
  } else {
    store_planes(staged, view.lanes(), view.row(n, y), view.channel_step, view.columns, view.channels);
  }
}

// The last few rows of a view, each staged once; rows that are as if staged are read in place.
template <typename scalar_t>
class Ring {
  using A = acc_t<scalar_t>;

 public:
  Ring(const View<const scalar_t>& view, Activation prologue, int slot)
      : view_(view),
        prologue_(prologue),
        in_place_(view.is_staged() && prologue == Activation::kNone),
        row_size_(view.columns * view.lanes()),
        staged_(in_place_ ? nullptr : scratch<A>(slot, kMaxRows * row_size_)) {}

  int64_t step() const { return in_place_ ? view_.column_step : view_.lanes(); }

  const A* row(int64_t n, int64_t y) {
    if (in_place_) return view_.staged(n, y);
    const int64_t row = n * view_.rows + y;
    A* staged = staged_ + row % kMaxRows * row_size_;
    if (held_[row % kMaxRows] != row) {
      held_[row % kMaxRows] = row;
      stage(view_, n, y, staged);
      if (prologue_ != Activation::kNone) {
        dispatch_activation(int64_t(prologue_), [&]<Activation kPrologue>() { activate_row<kPrologue>(staged, row_size_); });
      }
    }
    return staged;
  }

 private:
  View<const scalar_t> view_;
  Activation prologue_;
  bool in_place_;
  int64_t row_size_;
  A* staged_;
  int64_t held_[kMaxRows] = {-1, -1, -1, -1, -1};
};
}  // namespace ef::depthwise_conv
