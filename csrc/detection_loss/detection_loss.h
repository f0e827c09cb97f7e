// What the Tensor boundary may call; raw pointers only. Every level is one entry of a table that travels with the launch, so that all
// levels and images are done in one.
#pragma once
#include <cstdint>

#include "../common/platform.h"
#include "../focal_loss/focal_loss.h"
#include "detection_loss_math.h"

namespace ef::detection_loss {
using focal_loss::class_weight_at;
using focal_loss::Modulator;

// One head output [images, channels, pixels]; the channels are those of anchor 0, then of anchor 1, and so on. `grad` is dense, with
// the channels or the pixels innermost as in `x`.
template <typename scalar_t>
struct Output {
  const scalar_t* x;
  scalar_t* grad;  // null where none is wanted
  int64_t image_stride, channel_stride, pixel_stride;
  bool channels_last;
};

template <typename scalar_t>
struct Level {
  Output<scalar_t> cls, box;
  int64_t pixels, first_anchor;
};

// One label per anchor: a class, -1 background, -2 ignored; anything else counts as background.
struct Labels {
  const int64_t* wide;    // either this
  const int32_t* narrow;  // or this
  EF_HD int64_t operator[](int64_t i) const { return wide ? wide[i] : narrow[i]; }
};

// Upstream gradients of the three results, each one value or null for none; all null means 1 for the total.
template <typename A>
struct Upstream {
  const A *total, *cls, *box;
};

template <typename scalar_t>
struct Problem {
  using A = acc_t<scalar_t>;
  Level<scalar_t> levels[kMaxLevels];
  int level_count;
  int64_t images, anchors, per_cell, classes;  // anchors: of one image, all levels
  Labels labels;                               // [images, anchors]
  const A* box_targets;                        // [images, anchors, 4]
  const A* anchor_boxes;                       // [anchors, 4] xyxy, or null
  const A* positives;                          // [positive_count]; per image with LossNormalizer::kPerImage
  int64_t positive_count;
  LossNormalizer normalizer;
  double gamma;
  focal_loss::Parameters<A> focal;
  const A* class_weight;  // [classes], or null for 1
  BoxParameters<A> box;
  A box_loss_weight;
  Upstream<A> upstream;
  bool with_grad;  // whether every output's gradient is wanted, or none
};

// What the gradients of the classes' and the boxes' sums are multiplied by, apart from the normalizer.
template <typename scalar_t>
EF_HD acc_t<scalar_t> cls_scale(const Problem<scalar_t>& p) {
  using A = acc_t<scalar_t>;
  const Upstream<A>& u = p.upstream;
  if (!u.total && !u.cls && !u.box) return A(1);
  return (u.total ? *u.total : A(0)) + (u.cls ? *u.cls : A(0));
}
template <typename scalar_t>
EF_HD acc_t<scalar_t> box_scale(const Problem<scalar_t>& p) {
  using A = acc_t<scalar_t>;
  const Upstream<A>& u = p.upstream;
  if (!u.total && !u.cls && !u.box) return p.box_loss_weight;
  return p.box_loss_weight * (u.total ? *u.total : A(0)) + (u.box ? *u.box : A(0));
}

// The results, one value each; all null where only gradients are wanted.
template <typename A>
struct Losses {
  A *total, *cls, *box;
};

// Writes the losses and gradients that are wanted; the sums through partials[partial_count, 2], in a fixed order.
template <typename scalar_t>
void launch_detection_loss(Cpu, const Problem<scalar_t>& problem, acc_t<scalar_t>* partials, Losses<acc_t<scalar_t>> losses);
template <typename scalar_t>
void launch_detection_loss(Cuda, const Problem<scalar_t>& problem, acc_t<scalar_t>* partials, Losses<acc_t<scalar_t>> losses);
template <typename scalar_t>
int64_t partial_count(Cpu, const Problem<scalar_t>& problem);
template <typename scalar_t>
int64_t partial_count(Cuda, const Problem<scalar_t>& problem);

// Dense gradients for an upstream gradient of 1, brought in place to the real one; untouched where the factor is 1.
template <typename scalar_t>
struct Gradients {
  scalar_t* grad[2 * kMaxLevels];  // of the classes, then of the boxes
  int64_t count[2 * kMaxLevels];
  int cls_levels, levels;  // `levels` of both together
  acc_t<scalar_t> box_loss_weight;
  Upstream<acc_t<scalar_t>> upstream;
};
// The factor of the gradients number i.
template <typename scalar_t>
EF_HD acc_t<scalar_t> rescale_factor(const Gradients<scalar_t>& g, int i) {
  using A = acc_t<scalar_t>;
  const A total = g.upstream.total ? *g.upstream.total : A(0);
  if (i < g.cls_levels) return total + (g.upstream.cls ? *g.upstream.cls : A(0));
  return total + (g.upstream.box ? *g.upstream.box / g.box_loss_weight : A(0));
}
template <typename scalar_t>
void launch_rescale(Cpu, const Gradients<scalar_t>& gradients);
template <typename scalar_t>
void launch_rescale(Cuda, const Gradients<scalar_t>& gradients);
}  // namespace ef::detection_loss
