// How much score a box keeps that overlaps the box just taken. Scalar formulas: no memory, no torch.
//   gaussian: exp(-iou^2 / sigma) where iou > 0      linear: 1 - iou where iou > iou_threshold      1 elsewhere and where iou is NaN
#pragma once
#include "../common/math.h"
#include "../nms/nms_math.h"

namespace ef::soft_nms {
template <typename T>
struct Decay {
  T cut;              // overlaps up to here cost nothing: 0, or the IoU threshold
  T inverse_width;    // 1 / sigma
  T score_threshold;  // a box whose score is not above it is out
  static Decay of(bool gaussian, double sigma, double iou_threshold, double score_threshold) {
    return {gaussian ? T(0) : nms::threshold_in<T>(iou_threshold), static_cast<T>(1 / sigma), nms::threshold_in<T>(score_threshold)};
  }
};

// The score of a box that is out. A threshold is never below it, so no score that counts equals it.
template <typename T>
EF_HD T out_score() {
  return -T(INFINITY);
}

template <typename T>
EF_HD T start_score(T score, const Decay<T>& decay) {
  return score > decay.score_threshold ? score : out_score<T>();
}

template <bool kGaussian, typename T>
EF_HD T decayed_score(T score, T iou, const Decay<T>& decay) {
  T factor = T(1) - iou;
  if constexpr (kGaussian) factor = exp_of(-(iou * iou) * decay.inverse_width);
  return start_score(iou > decay.cut ? score * factor : score, decay);
}

// Whether boxes with this intersection can have an IoU above the cut: spares the division for most pairs.
template <typename T>
EF_HD bool may_decay(T intersection, const Decay<T>& decay) {
  return intersection > T(0) || decay.cut < T(0);
}
}  // namespace ef::soft_nms
