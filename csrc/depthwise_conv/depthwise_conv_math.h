// Index formulas of the depthwise convolution along one axis, for its gradient with respect to the input. No memory, no torch.
// Output position o reads input position i = o stride - pad + t through tap t. Seen from i, with q = (i + pad) mod stride: only the
// taps t = q, q + stride, ... reach it, from the outputs m, m - 1, ... where m = (i + pad - q) / stride. For stride 1 that is the
// flipped filter; for stride 2 each parity q has a shorter filter of its own.
#pragma once
#include "../common/math.h"
#include "../common/platform.h"

namespace ef::depthwise_conv {
// Number of taps of a phase q.
EF_HD constexpr int phase_taps(int kernel, int stride, int q) { return (kernel - q + stride - 1) / stride; }

// The taps of a phase in the order of the outputs they come from: the i-th comes from output m - (phase_taps - 1) + i.
EF_HD constexpr int phase_tap(int kernel, int stride, int q, int i) { return q + stride * (phase_taps(kernel, stride, q) - 1 - i); }

// How many of the positions 0 .. size - 1 have phase 0 .. q - 1 first: the first position of phase q.
EF_HD constexpr int64_t phase_start(int64_t pad, int stride, int q) { return ((q - pad) % stride + stride) % stride; }
}  // namespace ef::depthwise_conv
