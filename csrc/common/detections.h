// The detections of a batch of images: fixed shapes, each image's best first, its rows past the count cleared. Raw pointers only.
#pragma once
#include "platform.h"

namespace ef {
template <typename scalar_t>
struct Detections {
  scalar_t* boxes;   // [batch, max_detections, 4]
  scalar_t* scores;  // [batch, max_detections]
  int64_t* labels;   // [batch, max_detections]
  int64_t* indices;  // [batch, max_detections]
  int64_t* counts;   // [batch]

  // Row `row` of all images' rows becomes box `index` of its image, which lies at `box`.
  EF_HD void set(int64_t row, const scalar_t* box, scalar_t score, int64_t label, int64_t index) const {
    for (int k = 0; k < 4; ++k) boxes[row * 4 + k] = box[k];
    scores[row] = score;
    labels[row] = label;
    indices[row] = index;
  }
  EF_HD void clear(int64_t row) const {
    for (int k = 0; k < 4; ++k) boxes[row * 4 + k] = scalar_t(0.f);
    scores[row] = scalar_t(0.f);
    labels[row] = indices[row] = -1;
  }
};
}  // namespace ef
