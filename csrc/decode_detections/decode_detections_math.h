// The order of candidates and the decoding of boxes. Scalar formulas: no memory, no torch.
//   key(x): unsigned integers in the order of the logits; NaN above all, -0 as 0.
//   effdet: center = (ty, tx) * size_a + center_a, size = exp((th, tw)) * size_a      torchvision: (dx, dy, dw, dh), dw and dh bounded
#pragma once
#include <cmath>
#include <cstring>

#include "../common/choices.h"
#include "../common/platform.h"

namespace ef::decode_detections {
template <typename T>
using Key = std::conditional_t<std::is_same_v<T, double>, uint64_t, uint32_t>;

template <typename T>
EF_HD Key<T> key_of(T x) {
  constexpr Key<T> kSign = Key<T>(1) << (8 * sizeof(T) - 1);
  if (x != x) return ~Key<T>(0);
  x += T(0);
  Key<T> bits;
  std::memcpy(&bits, &x, sizeof(T));
  return bits & kSign ? ~bits : bits | kSign;
}
template <typename T>
EF_HD T value_of(Key<T> key) {
  constexpr Key<T> kSign = Key<T>(1) << (8 * sizeof(T) - 1);
  const Key<T> bits = key & kSign ? key & ~kSign : ~key;
  T x;
  std::memcpy(&x, &bits, sizeof(T));
  return x;
}

// A logit of an image: its key, and its place in the order (level, row, column, anchor, class).
template <typename T>
struct Candidate {
  Key<T> key;
  int64_t index;
};
// Whether a comes before b.
template <typename T>
EF_HD bool is_before(const Candidate<T>& a, const Candidate<T>& b) {
  return a.key > b.key || (a.key == b.key && a.index < b.index);
}

// In double, so that rounding keeps the order of the logits.
template <typename T>
EF_HD T score_of(Key<T> key) {
  return static_cast<T>(1 / (1 + exp(-static_cast<double>(value_of<T>(key)))));
}

template <typename T>
EF_HD T clip(T x, T limit) {
  x = x < T(0) ? T(0) : x;  // NaN stays
  return x > limit ? limit : x;
}

// corners: (x1, y1, x2, y2), of the anchor in, of the box out.
template <typename T>
EF_HD void decode(const T delta[4], T corners[4], BoxCoder coder) {
  const bool torchvision = coder == BoxCoder::kTorchvision;
  const T width = corners[2] - corners[0], height = corners[3] - corners[1];
  const T anchor_x = (corners[0] + corners[2]) / 2, anchor_y = (corners[1] + corners[3]) / 2;
  const T dx = torchvision ? delta[0] : delta[1], dy = torchvision ? delta[1] : delta[0];
  T log_width = torchvision ? delta[2] : delta[3], log_height = torchvision ? delta[3] : delta[2];
  if (torchvision) {
    constexpr T kLargest = T(4.135166556742356);  // log(1000 / 16)
    log_width = log_width > kLargest ? kLargest : log_width;
    log_height = log_height > kLargest ? kLargest : log_height;
  }
  const T center_x = dx * width + anchor_x, center_y = dy * height + anchor_y;
  const T half_width = exp(log_width) * width / 2, half_height = exp(log_height) * height / 2;
  corners[0] = center_x - half_width;
  corners[1] = center_y - half_height;
  corners[2] = center_x + half_width;
  corners[3] = center_y + half_height;
}
}  // namespace ef::decode_detections
