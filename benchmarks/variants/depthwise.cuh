// Depthwise convolution forward, k x k, stride 1, channels_last, bfloat16, as csrc/depthwise_conv has it: a thread owns a pair of channels
// x a few columns and marches down a tile of some rows. Only how it comes by the next row is another in each variant.
//
//              memory                        shared memory                   registers
//   words      row m + 1 ----------------------------------------------> words of 32 bit (Held)    as csrc does
//   async      row m + 2 or 4 --cp.async 4--> a thread's own slots -----> row m                    no barrier
//   staged     row m + 3 or 5 --cp.async 16-> the block's columns ------> row m                    a barrier a row; halos once a block
//
// The order of each sum is the same in all, and so is every bit of the result.
#pragma once
#include "depthwise_rows.cuh"
#include "launch_plan.h"

namespace ef::variants {
// Output row m of the tile stays in the registers m % kKernel, which the loop's unrolling makes constants, until row m + kKernel - 1 of
// the input, counted from the first that the tile reaches, has been added.
template <int kKernel, class Fetch>
__global__ void __launch_bounds__(Fetch::kThreads, Fetch::kMinBlocks) depthwise_kernel(const Map m, const bf16* __restrict__ x,
                                                                                       const bf16* __restrict__ weight,  // [c, k, k]
                                                                                       bf16* __restrict__ y) {
  constexpr int kColumns = Fetch::kColumns, kLoaded = Fetch::kLoaded, kDepth = kKernel - 1;
  const Place at = Fetch::place(m);
  if (!Fetch::kTogether && !at.inside) return;
  const int64_t oy = blockIdx.y * m.tile_rows, iy = oy - kKernel / 2, ix = at.column - kKernel / 2, column_step = m.c, row_step = m.w * m.c;
  const int rows = int(oy + m.tile_rows < m.h ? m.tile_rows : m.h - oy);
  const bf16* first = x + ((at.n * m.h + iy) * m.w + ix) * m.c + at.c;
  y += ((at.n * m.h + oy) * m.w + at.column) * m.c + at.c;
  const unsigned kept = at.inside ? depthwise_conv::inside<kColumns>(at.column, m.w) : 0;

  Fetch input(
      m, at, {first, row_step, column_step, depthwise_conv::rows_inside(iy, rows + kDepth, m.h), depthwise_conv::inside<kLoaded>(ix, m.w)});
  float filter[kKernel][kKernel][2], sum[kKernel][kColumns][2] = {};
#pragma unroll
  for (int i = 0; i < 2 * kKernel * kKernel; ++i) {
    const int v = i / (kKernel * kKernel), t = i % (kKernel * kKernel);
    filter[t / kKernel][t % kKernel][v] = at.inside ? float(weight[at.c * kKernel * kKernel + i]) : 0.f;
  }
  for (int begun = 0;; begun += kKernel) {
#pragma unroll
    for (int i = 0; i < kKernel; ++i) {
      const int row = begun + i;
      if (row >= rows + kDepth) return;
      float values[kLoaded][2];
      if (input.next(values)) {
#pragma unroll
        for (int t = 0; t < kKernel * kKernel; ++t) {
#pragma unroll
          for (int j = 0; j < kColumns * 2; ++j) {
            float& total = sum[(i - t / kKernel + kKernel) % kKernel][j / 2][j % 2];
            total = (t == 0 ? 0.f : total) + filter[t / kKernel][t % kKernel][j % 2] * values[j / 2 + t % kKernel][j % 2];
          }
        }
      } else {
#pragma unroll
        for (int j = 0; j < kColumns * 2; ++j) sum[i][j / 2][j % 2] = 0.f;
      }
      if (row < kDepth) continue;
      bf16* column = y;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const float* result = sum[(i + 1) % kKernel][j];
        if (kept >> j & 1) store_vec<2>(column, Vec<bf16, 2>{bf16(result[0]), bf16(result[1])});
        column += column_step;
      }
      y += row_step;
    }
  }
}

template <int kKernel, class Fetch>
auto depthwise_launch(const Map& m) {
  return LaunchPlan{depthwise_kernel<kKernel, Fetch>, dim3(unsigned(Fetch::blocks(m)), unsigned(ceil_div(m.h, m.tile_rows))),
                    dim3(Fetch::kThreads), Fetch::kSharedBytes};
}

// f(name, launch plan) for each variant, the plain one first.
template <int kKernel, class F>
void each_depthwise(const Map& m, F&& f) {
  f("words", depthwise_launch<kKernel, Held<kKernel>>(m));
  f("async, 2 ahead", depthwise_launch<kKernel, Async<kKernel, 2>>(m));
  f("async, 4 ahead", depthwise_launch<kKernel, Async<kKernel, 4>>(m));
  const auto staged = [&]<int kChannels>() {
    f("staged, 4 rows", depthwise_launch<kKernel, Staged<kKernel, 4, kChannels>>(m));
    f("staged, 6 rows", depthwise_launch<kKernel, Staged<kKernel, 6, kChannels>>(m));
  };
  m.c <= 32 ? staged.template operator()<32>() : staged.template operator()<64>();
}
}  // namespace ef::variants
