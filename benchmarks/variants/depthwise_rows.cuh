// The ways to a thread's next row, as drawn in depthwise.cuh. Each says which channels and columns a thread of which block has (`place`),
// and next(values) hands out the columns of one row after the other; false, and nothing, where there is no such row.
#pragma once
#include <cstring>

#include "../../csrc/common/launch.cuh"
#include "../../csrc/common/vec.cuh"
#include "../../csrc/depthwise_conv/depthwise_conv_kernel.cuh"
#include "async_copy.cuh"

namespace ef::variants {
using bf16 = c10::BFloat16;
using depthwise_conv::RowRange;

struct Map {
  int64_t n, c, h, w;  // x and y [n, h, w, c], c even
  int64_t tile_rows;
};

// A thread's image, first channel and first column; not `inside`: it has none, and only helps its block.
struct Place {
  int64_t n, c, column;
  bool inside;
};

// What a thread reads: rows from `first` on (it may lie outside), those of them that exist, and the columns of it that do, as bits.
struct Rows {
  const bf16* first;
  int64_t row_step, column_step;
  RowRange there;
  unsigned valid;
};

__device__ inline uint32_t load_word(const bf16* p) { return *reinterpret_cast<const uint32_t*>(p); }
__device__ inline void unpack_word(uint32_t word, float (&values)[2]) {
  const uint32_t bits[2] = {word << 16, word & 0xffff0000u};
  std::memcpy(values, bits, sizeof(values));
}

// Threads that do not share a row: flattened over (n, column group, channel pair).
template <int kKernel>
struct Alone {
  static constexpr int kThreads = 128, kMinBlocks = kKernel == 5 ? 2 : 4, kColumns = 4, kLoaded = kColumns + kKernel - 1;
  static constexpr bool kTogether = false;
  EF_HD static int64_t cells(const Map& m) { return m.n * (m.c / 2) * ceil_div(m.w, kColumns); }
  static int64_t blocks(const Map& m) { return ceil_div(cells(m), kThreads); }
  __device__ static Place place(const Map& m) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x, pairs = m.c / 2, groups = ceil_div(m.w, kColumns);
    return {i / pairs / groups, i % pairs * 2, i / pairs % groups * kColumns, i < cells(m)};
  }
};

// The next row, asked for before the arithmetic of this one.
template <int kKernel>
class Held : public Alone<kKernel> {
 public:
  using Alone<kKernel>::kLoaded;
  static constexpr size_t kSharedBytes = 0;

  __device__ Held(const Map&, const Place&, const Rows& rows) : rows_(rows), row_(rows.first) { fetch(); }
  __device__ bool next(float (&values)[kLoaded][2]) {
    const bool exists = rows_.there.has(index_);
    if (exists) {
#pragma unroll
      for (int i = 0; i < kLoaded; ++i) unpack_word(ahead_[i], values[i]);
    }
    ++index_;
    row_ += rows_.row_step;
    fetch();
    return exists;
  }

 private:
  __device__ void fetch() {
    if (!rows_.there.has(index_)) return;
    const bf16* column = row_;
#pragma unroll
    for (int i = 0; i < kLoaded; ++i) {
      if (rows_.valid >> i & 1) ahead_[i] = load_word(column);
      column += rows_.column_step;
      forget_origin(column);
    }
  }

  Rows rows_;
  const bf16* row_;
  int index_ = 0;
  uint32_t ahead_[kLoaded] = {};  // columns outside stay zero
};

// kAhead rows on their way into slots of the thread's own: [kSlots][kLoaded][kThreads] words, so that lanes lie side by side.
template <int kKernel, int kAhead>
class Async : public Alone<kKernel> {
 public:
  using Alone<kKernel>::kLoaded;
  using Alone<kKernel>::kThreads;
  static constexpr int kSlots = kAhead + 1, kSlotWords = kLoaded * kThreads;
  static constexpr size_t kSharedBytes = kSlots * kSlotWords * sizeof(uint32_t);

  __device__ Async(const Map&, const Place&, const Rows& rows) : rows_(rows), row_(rows.first) {
    own_ = shared_memory<uint32_t>() + threadIdx.x;
    for (int slot = 0; slot < kSlots; ++slot) {
#pragma unroll
      for (int i = 0; i < kLoaded; ++i) {
        if (!(rows.valid >> i & 1)) own_[slot * kSlotWords + i * kThreads] = 0;  // and so it stays
      }
    }
#pragma unroll
    for (int r = 0; r < kAhead; ++r) fetch();
  }
  __device__ bool next(float (&values)[kLoaded][2]) {
    fetch();  // into the slot of the row before, whose words have been used
    wait_for_copies<kAhead>();
    const bool exists = rows_.there.has(index_++);
    const uint32_t* slot = own_ + read_ * kSlotWords;
    read_ = read_ + 1 == kSlots ? 0 : read_ + 1;
    if (exists) {
#pragma unroll
      for (int i = 0; i < kLoaded; ++i) unpack_word(slot[i * kThreads], values[i]);
    }
    return exists;
  }

 private:
  __device__ void fetch() {
    uint32_t* slot = own_ + written_ * kSlotWords;
    written_ = written_ + 1 == kSlots ? 0 : written_ + 1;
    if (rows_.there.has(asked_++)) {
      const bf16* column = row_;
#pragma unroll
      for (int i = 0; i < kLoaded; ++i) {
        if (rows_.valid >> i & 1) copy_async<4>(slot + i * kThreads, column);
        column += rows_.column_step;
        forget_origin(column);
      }
    }
    row_ += rows_.row_step;
    commit_copies();  // an empty group too: their number is that of the rows
  }

  Rows rows_;
  const bf16* row_;
  uint32_t* own_;
  int index_ = 0, asked_ = 0, read_ = 0, written_ = 0;
};

// A block owns kChannels channels x kWidth columns and copies whole rows of them, with the halo, in pieces of 8 channels; c % 8 == 0.
template <int kKernel, int kSlots, int kChannels>
class Staged {
 public:
  static constexpr int kColumns = kKernel == 5 ? 8 : 4, kLoaded = kColumns + kKernel - 1;
  static constexpr int kPairs = kChannels / 2, kWidth = 32 * 64 / kChannels, kThreads = kPairs * (kWidth / kColumns), kMinBlocks = 2;
  static constexpr bool kTogether = true;
  // With 32 channels half a warp reads one column and half another; the gap puts those into different banks.
  static constexpr int kGap = kChannels < 64 ? kChannels : 0, kStaged = kWidth + kKernel - 1, kParts = kChannels / 8;
  static constexpr int kSlotSize = kStaged * kChannels + (kStaged - 1) / kColumns * kGap;
  static constexpr int kCopies = (kStaged * kParts + kThreads - 1) / kThreads;
  static constexpr size_t kSharedBytes = kSlots * kSlotSize * sizeof(bf16);

  static int64_t blocks(const Map& m) { return m.n * ceil_div(m.w, kWidth) * ceil_div(m.c, kChannels); }
  __device__ static Place place(const Map& m) {
    const int64_t across = ceil_div(m.c, kChannels), along = ceil_div(m.w, kWidth), block = blockIdx.x;
    const int64_t c = block % across * kChannels + threadIdx.x % kPairs * 2;
    const int64_t column = block / across % along * kWidth + threadIdx.x / kPairs * kColumns;
    return {block / across / along, c, column, c < m.c && column < m.w};
  }

  __device__ Staged(const Map& m, const Place& at, const Rows& rows) : there_(rows.there), row_step_(rows.row_step) {
    const int group = threadIdx.x / kPairs, pair = threadIdx.x % kPairs;
    const int64_t first_column = at.column - group * kColumns - kKernel / 2, first_channel = at.c - pair * 2;
    row_ = rows.first - (pair * 2 + group * kColumns * m.c);  // of the block
    slots_ = shared_memory<bf16>();
    own_ = slots_ + offset(group * kColumns) + pair * 2;
#pragma unroll
    for (int k = 0; k < kCopies; ++k) {
      const int i = threadIdx.x + k * kThreads, column = i / kParts, part = i % kParts;
      const int64_t x = first_column + column;
      from_[k] = int(column * m.c + part * 8);
      to_[k] = offset(column) + part * 8;
      if (i >= kStaged * kParts) continue;
      if (x >= 0 && x < m.w && first_channel + part * 8 < m.c) {
        copied_ |= 1u << k;
      } else {
        for (int slot = 0; slot < kSlots; ++slot) store_vec<8>(slots_ + slot * kSlotSize + to_[k], Vec<bf16, 8>{});  // and so it stays
      }
    }
#pragma unroll
    for (int r = 0; r < kSlots - 1; ++r) fetch();
  }
  __device__ bool next(float (&values)[kLoaded][2]) {
    wait_for_copies<kSlots - 2>();
    __syncthreads();  // this row has arrived for all, and all have used the one before, whose slot is filled next
    fetch();
    const bool exists = there_.has(index_++);
    const bf16* slot = own_ + read_ * kSlotSize;
    read_ = read_ + 1 == kSlots ? 0 : read_ + 1;
    if (exists) {
#pragma unroll
      for (int i = 0; i < kLoaded; ++i) unpack_word(load_word(slot + offset(i)), values[i]);
    }
    return exists;
  }

 private:
  __device__ static constexpr int offset(int column) { return column * kChannels + column / kColumns * kGap; }
  __device__ void fetch() {
    bf16* slot = slots_ + written_ * kSlotSize;
    written_ = written_ + 1 == kSlots ? 0 : written_ + 1;
    if (there_.has(asked_++)) {
#pragma unroll
      for (int k = 0; k < kCopies; ++k) {
        if (copied_ >> k & 1) copy_async<16>(slot + to_[k], row_ + from_[k]);
      }
    }
    row_ += row_step_;
    commit_copies();
  }

  RowRange there_;
  int64_t row_step_;
  const bf16 *row_, *own_;
  bf16* slots_;
  int from_[kCopies], to_[kCopies];
  unsigned copied_ = 0;
  int index_ = 0, asked_ = 0, read_ = 0, written_ = 0;
};
}  // namespace ef::variants
