// Box loss of one anchor from its four deltas and their targets, with the gradient with respect to the deltas. Scalar formulas: no
// memory, no torch. A logit's part is focal_loss_math.h.
//   huber      0.5 e^2 where |e| <= delta, else delta (|e| - delta / 2), of the deltas whose target is not 0; a quarter of the sum
//   l1         |e|                          e = predicted - target, summed over the deltas of a positive anchor
//   smooth_l1  0.5 e^2 / delta where |e| < delta, else |e| - delta / 2; likewise
//   giou       1 - GIoU of the boxes that deltas and targets stand for, of a positive anchor (Rezatofighi et al., 2019)
#pragma once
#include "../common/choices.h"
#include "../common/math.h"
#include "../focal_loss/focal_loss_math.h"

namespace ef::detection_loss {
// What a sum is multiplied by: 1 / (all positives + 1), or for image i of n 1 / (n max(1, its positives)).
template <typename A>
EF_HD A batch_factor(A all_positives) {
  return A(1) / (all_positives + A(1));
}
template <typename A>
EF_HD A image_factor(A positives, int64_t images) {
  return A(1) / ((positives > A(1) ? positives : A(1)) * A(images));
}

template <typename A>
struct Element {
  A loss, grad;
};

// A gradient times what comes from above. None stays none, be that NaN: what is masked or ignored takes no part.
template <typename A>
EF_HD A scaled(A scale, A grad) {
  return grad == A(0) ? A(0) : scale * grad;
}

// Focal loss of one logit with its alpha, and the derivative; an ignored one has none of either, whatever its logit.
template <focal_loss::Modulator kModulator, typename A>
EF_HD Element<A> focal(A x, bool positive, bool ignored, const focal_loss::Parameters<A>& p) {
  const A value = ignored ? A(0) : x, weight = ignored ? A(0) : (positive ? p.alpha_positive : p.alpha_negative);
  const auto f = focal_loss::hard_loss_and_grad<kModulator>(positive ? -value : value, p);
  return {weight * f.loss, (positive ? -weight : weight) * f.grad};
}

template <typename A>
EF_HD Element<A> huber(A predicted, A target, A delta) {
  const A e = predicted - target, size = e < A(0) ? -e : e;
  const A near = size > delta ? delta : size, slope = e > delta ? delta : (e < -delta ? -delta : e);
  const bool counts = target != A(0);
  return {counts ? A(0.25) * near * (size - A(0.5) * near) : A(0), counts ? A(0.25) * slope : A(0)};
}
template <typename A>
EF_HD Element<A> l1(A predicted, A target) {
  const A e = predicted - target;
  return {e < A(0) ? -e : e, e > A(0) ? A(1) : (e < A(0) ? A(-1) : e)};
}
template <typename A>
EF_HD Element<A> smooth_l1(A predicted, A target, A beta) {
  const A e = predicted - target, size = e < A(0) ? -e : e;
  if (size < beta) return {A(0.5) * e * e / beta, e / beta};
  return {size - A(0.5) * beta, e > A(0) ? A(1) : (e < A(0) ? A(-1) : e)};
}

template <typename A>
struct Box {
  A v[4];  // xyxy
};
// torchvision limits the logarithm of a side relative to its anchor's to log(1000 / 16).
template <typename A>
inline constexpr A kMaxLogScale = A(4.135166556742356);

// Reads boxes from deltas. Positions are chosen by value, not by index, so that a GPU keeps deltas in registers.
template <typename A>
struct Decoder {
  bool y_first;
  A limit, anchor_x, anchor_y, anchor_w, anchor_h;
  EF_HD Decoder(const A* anchor, BoxCoder coder, bool limited) {
    y_first = coder == BoxCoder::kEffdet;
    limit = limited && !y_first ? kMaxLogScale<A> : A(INFINITY);
    anchor_w = anchor[2] - anchor[0], anchor_h = anchor[3] - anchor[1];
    anchor_x = anchor[0] + A(0.5) * anchor_w, anchor_y = anchor[1] + A(0.5) * anchor_h;
  }
  EF_HD A w(const A* deltas) const { return y_first ? deltas[3] : deltas[2]; }
  EF_HD A h(const A* deltas) const { return y_first ? deltas[2] : deltas[3]; }
  EF_HD A half_side(A log_scale, A of_anchor) const { return A(0.5) * exp_of(log_scale > limit ? limit : log_scale) * of_anchor; }
  EF_HD Box<A> box(const A* deltas) const {
    const A x = (y_first ? deltas[1] : deltas[0]) * anchor_w + anchor_x, y = (y_first ? deltas[0] : deltas[1]) * anchor_h + anchor_y;
    const A half_w = half_side(w(deltas), anchor_w), half_h = half_side(h(deltas), anchor_h);
    return {{x - half_w, y - half_h, x + half_w, y + half_h}};
  }
  // Gradient with respect to the deltas from that with respect to the corners.
  EF_HD void chain(const A* deltas, const A* g, A* grad) const {
    const A x = (g[0] + g[2]) * anchor_w, y = (g[1] + g[3]) * anchor_h;
    const A width = w(deltas) > limit ? A(0) : (g[2] - g[0]) * half_side(w(deltas), anchor_w);
    const A height = h(deltas) > limit ? A(0) : (g[3] - g[1]) * half_side(h(deltas), anchor_h);
    grad[0] = y_first ? y : x, grad[1] = y_first ? x : y;
    grad[2] = y_first ? height : width, grad[3] = y_first ? width : height;
  }
};

// The share of a minimum or maximum's gradient that its first argument gets; both share it where they are equal, as in PyTorch.
template <typename A>
EF_HD A first_share(A first, A second, bool of_minimum) {
  if (first == second) return A(0.5);
  return (first < second) == of_minimum ? A(1) : A(0);
}

// 1 - GIoU of p and t; grad: with respect to p's corners.
template <typename A>
EF_HD A giou_loss(const Box<A>& p, const Box<A>& t, A* grad) {
  constexpr A kEps = A(1e-7);
  A overlap[2], hull[2], size_p[2], size_t_[2];
  for (int k = 0; k < 2; ++k) {
    const A low = p.v[k] < t.v[k] ? t.v[k] : p.v[k], high = p.v[k + 2] < t.v[k + 2] ? p.v[k + 2] : t.v[k + 2];
    overlap[k] = high - low;
    hull[k] = (p.v[k + 2] < t.v[k + 2] ? t.v[k + 2] : p.v[k + 2]) - (p.v[k] < t.v[k] ? p.v[k] : t.v[k]);
    size_p[k] = p.v[k + 2] - p.v[k];
    size_t_[k] = t.v[k + 2] - t.v[k];
  }
  const bool meet = overlap[0] > A(0) && overlap[1] > A(0);
  const A intersection = meet ? overlap[0] * overlap[1] : A(0);
  const A united = size_p[0] * size_p[1] + size_t_[0] * size_t_[1] - intersection, area = hull[0] * hull[1];
  const A u = A(1) / (united + kEps), c = A(1) / (area + kEps);
  // loss = 1 - I u + (C - U) c, with U = P + T - I
  const A by_union = intersection * u * u - c;
  const A by_intersection = -u - by_union, by_hull = c - (area - united) * c * c;
  for (int k = 0; k < 2; ++k) {
    const A low_share = first_share(p.v[k], t.v[k], false), high_share = first_share(p.v[k + 2], t.v[k + 2], true);
    const A overlap_grad = meet ? by_intersection * overlap[1 - k] : A(0), hull_grad = by_hull * hull[1 - k];
    const A size_grad = by_union * size_p[1 - k];
    grad[k] = -size_grad - low_share * overlap_grad - (A(1) - low_share) * hull_grad;
    grad[k + 2] = size_grad + high_share * overlap_grad + (A(1) - high_share) * hull_grad;
  }
  return A(1) - intersection * u + (area - united) * c;
}

template <typename A>
struct BoxParameters {
  BoxLoss loss;
  BoxCoder coder;
  A delta;
};

// Loss of one anchor; grad[4] with respect to its deltas. `anchor` is read by kGiou only.
template <typename A>
EF_HD A box_loss(const A* deltas, const A* targets, const A* anchor, bool positive, const BoxParameters<A>& p, A* grad) {
  A sum = 0;
  if (p.loss == BoxLoss::kHuber) {
    for (int k = 0; k < 4; ++k) {
      const Element<A> element = huber(deltas[k], targets[k], p.delta);
      sum += element.loss;
      grad[k] = element.grad;
    }
  } else if (!positive) {
    for (int k = 0; k < 4; ++k) grad[k] = A(0);
  } else if (p.loss == BoxLoss::kGiou) {
    const Decoder<A> decoder(anchor, p.coder, true);
    A corners[4];
    sum = giou_loss(decoder.box(deltas), Decoder<A>(anchor, p.coder, false).box(targets), corners);
    decoder.chain(deltas, corners, grad);
  } else {
    for (int k = 0; k < 4; ++k) {
      const Element<A> element = p.loss == BoxLoss::kL1 ? l1(deltas[k], targets[k]) : smooth_l1(deltas[k], targets[k], p.delta);
      sum += element.loss;
      grad[k] = element.grad;
    }
  }
  return sum;
}
}  // namespace ef::detection_loss
