// When a box suppresses another: the IoU of common/box.h against a threshold. A NaN IoU exceeds none.
#pragma once
#include <cmath>
#include <limits>

#include "../common/box.h"

namespace ef::nms {
// The largest T that is not above a threshold: no value of T lies between, so `iou > threshold` means the same for both.
template <typename T>
T threshold_in(double threshold) {
  const T nearest = static_cast<T>(threshold);
  return static_cast<double>(nearest) > threshold ? std::nextafter(nearest, -std::numeric_limits<T>::infinity()) : nearest;
}
}  // namespace ef::nms
