// Sums over the rows of a block whose threads have kVec channels each, `columns` threads side by side, through shared memory.
#pragma once
#include "launch.cuh"
#include "vec.cuh"

namespace ef {
// Of shared memory for blocks of so many rows and columns.
template <int kVec, int kSums, typename A>
size_t row_sum_bytes(int64_t rows, int64_t columns) {
  return kSums * rows * columns * kVec * sizeof(A);
}
// Calls done(channel, totals) for each channel of the block, counted from its first one, with its kSums sums over the rows, added in order.
// For all threads of the block; those of row `rows` and behind have no part. Lanes write four channels each, side by side, then read one
// each, side by side again: shared[sum][four of kVec][row][column][of the four].
template <int kVec, int kSums, typename A, class Done>
__device__ void sum_over_rows(const A (&sums)[kSums][kVec], int row, int column, int rows, int columns, Done&& done) {
  constexpr int kFour = kVec % 4 == 0 ? 4 : 1, kFours = kVec / kFour;
  A* shared = shared_memory<A>();
  const int width = columns * kFour, all = rows * width;
  if (row < rows) {
#pragma unroll
    for (int s = 0; s < kSums * kFours; ++s) {
      Vec<A, kFour> four;
#pragma unroll
      for (int q = 0; q < kFour; ++q) four.v[q] = sums[s / kFours][s % kFours * kFour + q];
      *reinterpret_cast<Vec<A, kFour>*>(shared + s * all + row * width + column * kFour) = four;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < width * kFours; i += blockDim.x) {
    const int four = i / width, at = i - four * width;
    A totals[kSums] = {};
    for (int r = 0; r < rows; ++r) {
#pragma unroll
      for (int s = 0; s < kSums; ++s) totals[s] += shared[(s * kFours + four) * all + r * width + at];
    }
    done(at / kFour * kVec + four * kFour + at % kFour, totals);
  }
}
}  // namespace ef
