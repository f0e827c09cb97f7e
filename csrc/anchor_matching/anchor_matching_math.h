// Matching anchors to boxes: how large an IoU can get in a group of anchors, and the deltas of a box. Scalar formulas: no memory, no torch.
// IoU as in common/box.h, rounded operation by operation. All comparisons are of the form `iou > x`, which a NaN never passes.
#pragma once
#include "../common/box.h"
#include "../common/choices.h"
#include "../common/math.h"

namespace ef::anchor_matching {
// A group of anchors: the box round them, whose `area` is the smallest area of an anchor, and the largest area.
template <typename T>
struct Group {
  Box<T> hull;
  T largest;
};
template <typename T>
EF_HD T smaller(T a, T b) {  // a NaN in `a` is passed over
  return a < b ? a : b;
}
template <typename T>
EF_HD T larger(T a, T b) {
  return b < a ? a : b;
}
template <typename T>
EF_HD Group<T> join(const Group<T>& a, const Group<T>& b) {
  return {{smaller(a.hull.x1, b.hull.x1), smaller(a.hull.y1, b.hull.y1), larger(a.hull.x2, b.hull.x2), larger(a.hull.y2, b.hull.y2),
           smaller(a.hull.area, b.hull.area)},
          larger(a.largest, b.largest)};
}
// An anchor turned inside out overlaps nothing; counted as empty it leaves the bound sound.
template <typename T>
EF_HD Group<T> group_of(const Box<T>& anchor) {
  const T area = larger(anchor.area, T(0));
  return {{anchor.x1, anchor.y1, anchor.x2, anchor.y2, area}, area};
}
// Of no anchors; joined with others it changes nothing.
template <typename T>
EF_HD Group<T> empty_group() {
  constexpr T kInfinity = T(__builtin_huge_val());
  return {{kInfinity, kInfinity, -kInfinity, -kInfinity, kInfinity}, T(0)};
}

// No anchor of the group has a larger IoU with the box, not even by a rounding: each step is the one of iou(), on operands that are
// no better, and rounding keeps order.
template <typename T>
EF_HD T iou_bound(const Group<T>& group, const Box<T>& box) {
  const T inter = smaller(intersection(group.hull, box), group.largest);
  return rounded_quotient(inter, (group.hull.area + box.area) - inter);
}

// Whether a group whose bound is `bound` may hold an IoU that reaches `limit`; a NaN says nothing.
template <typename T>
EF_HD bool may_reach(T bound, T limit) {
  return !(bound < limit);
}

template <typename T>
EF_HD void encode(BoxCoder coder, const Box<T>& box, const Box<T>& anchor, T* deltas) {  // [4]
  if (coder == BoxCoder::kNone) {
    deltas[0] = box.x1;
    deltas[1] = box.y1;
    deltas[2] = box.x2;
    deltas[3] = box.y2;
    return;
  }
  const bool effdet = coder == BoxCoder::kEffdet;
  const T eps = effdet ? T(1e-7) : T(0);
  const T width = box.x2 - box.x1, height = box.y2 - box.y1;
  const T anchor_width = anchor.x2 - anchor.x1, anchor_height = anchor.y2 - anchor.y1;
  const T dx = (box.x1 + width / 2) - (anchor.x1 + anchor_width / 2), dy = (box.y1 + height / 2) - (anchor.y1 + anchor_height / 2);
  const T x = dx / (anchor_width + eps), y = dy / (anchor_height + eps);
  const T w = log_of((width + eps) / (anchor_width + eps)), h = log_of((height + eps) / (anchor_height + eps));
  deltas[0] = effdet ? y : x;
  deltas[1] = effdet ? x : y;
  deltas[2] = effdet ? h : w;
  deltas[3] = effdet ? w : h;
}
}  // namespace ef::anchor_matching
