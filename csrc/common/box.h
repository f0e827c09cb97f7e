// Intersection over union of two boxes (x1, y1, x2, y2). Scalar formulas: no memory, no torch.
//   inter = max(0, min(x2) - max(x1)) max(0, min(y2) - max(y1))    iou = inter / ((area_a + area_b) - inter)
// Every operation is rounded on its own, in this order: a product fused with the sum after it would decide ties at the threshold
// differently from PyTorch. A NaN anywhere makes an area NaN and so the IoU, which then exceeds no threshold.
#pragma once
#include "platform.h"

namespace ef {
#if defined(__CUDA_ARCH__)
EF_HD float rounded_product(float a, float b) { return __fmul_rn(a, b); }
EF_HD double rounded_product(double a, double b) { return __dmul_rn(a, b); }
EF_HD float rounded_quotient(float a, float b) { return __fdiv_rn(a, b); }
EF_HD double rounded_quotient(double a, double b) { return __ddiv_rn(a, b); }
#else
template <typename T>
EF_HD T rounded_product(T a, T b) {
#if defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
  return __builtin_assoc_barrier(a * b);  // GCC fuses across statements, clang does not
#else
  return a * b;
#endif
}
template <typename T>
EF_HD T rounded_quotient(T a, T b) {
  return a / b;
}
#endif

template <typename T>
struct Box {
  T x1, y1, x2, y2, area;
};
template <typename T>
EF_HD Box<T> box_of(T x1, T y1, T x2, T y2) {
  return {x1, y1, x2, y2, rounded_product(x2 - x1, y2 - y1)};
}

template <typename T>
EF_HD T intersection(const Box<T>& a, const Box<T>& b) {
  const T x1 = a.x1 < b.x1 ? b.x1 : a.x1, y1 = a.y1 < b.y1 ? b.y1 : a.y1;
  const T x2 = b.x2 < a.x2 ? b.x2 : a.x2, y2 = b.y2 < a.y2 ? b.y2 : a.y2;
  const T width = x2 - x1, height = y2 - y1;
  return rounded_product(T(0) < width ? width : T(0), T(0) < height ? height : T(0));
}
template <typename T>
EF_HD T iou(const Box<T>& a, const Box<T>& b) {
  const T inter = intersection(a, b);
  return rounded_quotient(inter, (a.area + b.area) - inter);
}
}  // namespace ef
