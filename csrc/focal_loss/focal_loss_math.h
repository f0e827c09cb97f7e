// Focal loss of one logit x (Lin et al., 2017), with label smoothing on the cross entropy only. Scalar formulas: no memory, no torch.
//   p = sigmoid(x)    p_t = p t + (1 - p)(1 - t)    alpha_t = alpha t + (1 - alpha)(1 - t)    t_s = t (1 - s) + s / 2
//   loss = alpha_t (1 - p_t)^gamma (softplus(x) - x t_s), times the weight of the logit's class where classes have one
// For a hard target put z = -x (t = 1) or z = x (t = 0): then 1 - p_t = sigmoid(z) and the cross entropy is softplus(z) - z s / 2,
// the same formula for both.
#pragma once
#include "../common/math.h"

namespace ef::focal_loss {
enum class Modulator { kSquare, kThreeHalves, kAny };  // gamma = 2, gamma = 1.5, any other

// Calls f.template operator()<Modulator::...>() for an exponent.
template <class F>
void dispatch_modulator(double gamma, F&& f) {
  if (gamma == 2) return f.template operator()<Modulator::kSquare>();
  if (gamma == 1.5) return f.template operator()<Modulator::kThreeHalves>();
  return f.template operator()<Modulator::kAny>();
}

template <typename acc_t>
struct Parameters {
  acc_t alpha_positive, alpha_negative;  // alpha_t at t = 1 and t = 0; both 1 where the weighting is off
  acc_t gamma, smoothing;

  static Parameters of(double alpha, double gamma, double smoothing) {
    const bool weighted = alpha >= 0;
    return {acc_t(weighted ? alpha : 1), acc_t(weighted ? 1 - alpha : 1), acc_t(gamma), acc_t(smoothing)};
  }
};

// y^gamma for y in [0, 1] whose logarithm is log_y.
template <Modulator kModulator, typename acc_t>
EF_HD acc_t modulate(acc_t y, acc_t log_y, acc_t gamma) {
  if constexpr (kModulator == Modulator::kSquare) return y * y;
  if constexpr (kModulator == Modulator::kThreeHalves) return y * sqrt_of(y);
  return exp_of(gamma * log_y);
}

// The weight of every class where none is given; a pointer [classes] stands in its place where one is.
template <typename acc_t>
struct NoClassWeight {
  EF_HD acc_t operator[](int64_t) const { return acc_t(1); }
};

template <typename acc_t>
struct Logistic {  // everything the formulas need of z, from one exponential
  acc_t y, one_minus_y, softplus, log_y;
};
template <typename acc_t>
EF_HD Logistic<acc_t> logistic(acc_t z) {
  const acc_t e = bounded_exp(-z), y = quotient_of(acc_t(1), acc_t(1) + e), one_minus_y = e * y;
  const acc_t l = minus_log1m(min_of(y, one_minus_y));  // log(1 + exp(-|z|))
  return {y, one_minus_y, positive_part(z) + l, -positive_part(-z) - l};
}

// Coefficients of the derivative, times `factor` (the upstream gradient and alpha), which saves a multiplication per logit.
template <typename acc_t>
struct Slope {
  acc_t unit, gamma, half_smoothing;
  EF_HD Slope(const Parameters<acc_t>& p, acc_t factor)
      : unit(factor), gamma(factor * p.gamma), half_smoothing(factor * acc_t(0.5) * p.smoothing) {}
};

// Hard target: the loss for z and its derivative with respect to z, without alpha_t; they share the exponential, logarithm and power.
template <typename acc_t>
struct LossAndGrad {
  acc_t loss, grad;
};
template <Modulator kModulator, typename acc_t>
EF_HD LossAndGrad<acc_t> hard_loss_and_grad(acc_t z, const Parameters<acc_t>& p, const Slope<acc_t>& slope) {
  const Logistic<acc_t> f = logistic(z);
  const acc_t cross_entropy = f.softplus - z * (acc_t(0.5) * p.smoothing);
  const acc_t power = modulate<kModulator>(f.y, f.log_y, p.gamma);
  // d(y^gamma)/dz = gamma y^gamma (1 - y): no power below gamma, so nothing diverges as y -> 0.
  const acc_t rest = slope.unit * f.y - slope.half_smoothing;
  return {power * cross_entropy, power * (slope.gamma * f.one_minus_y * cross_entropy + rest)};
}
template <Modulator kModulator, typename acc_t>
EF_HD LossAndGrad<acc_t> hard_loss_and_grad(acc_t z, const Parameters<acc_t>& p) {
  return hard_loss_and_grad<kModulator>(z, p, Slope<acc_t>(p, acc_t(1)));
}
template <Modulator kModulator, typename acc_t>
EF_HD acc_t hard_loss(acc_t z, const Parameters<acc_t>& p) {
  return hard_loss_and_grad<kModulator>(z, p).loss;
}
template <Modulator kModulator, typename acc_t>
EF_HD acc_t hard_grad(acc_t z, const Parameters<acc_t>& p) {
  return hard_loss_and_grad<kModulator>(z, p).grad;
}

// What the formulas need of x and a soft target t in [0, 1].
template <Modulator kModulator, typename acc_t>
struct Soft {
  acc_t p, q, slope, weight, cross_entropy, cross_entropy_grad;  // q = 1 - p, weight = alpha_t (1 - p_t)^gamma
  EF_HD Soft(acc_t x, acc_t t, const Parameters<acc_t>& parameters) {
    const Logistic<acc_t> f = logistic(x);
    p = f.y;
    q = f.one_minus_y;
    const acc_t y = p * (acc_t(1) - t) + q * t;  // 1 - p_t
    const acc_t smoothed = t * (acc_t(1) - parameters.smoothing) + acc_t(0.5) * parameters.smoothing;
    const acc_t alpha = parameters.alpha_positive * t + parameters.alpha_negative * (acc_t(1) - t);
    const acc_t log_y = kModulator == Modulator::kAny ? log_of(y) : acc_t(0);
    weight = alpha * modulate<kModulator>(y, log_y, parameters.gamma);
    // (dy/dx) / y; as y -> 0 the power vanishes faster, so 0 stands for the quotient there.
    slope = y > acc_t(0) ? (acc_t(1) - acc_t(2) * t) * p * q / y : y;
    // softplus(x) - x t_s and p - t_s, written without cancellation.
    cross_entropy = (acc_t(1) - smoothed) * f.softplus - smoothed * f.log_y;
    cross_entropy_grad = (acc_t(1) - smoothed) * p - smoothed * q;
  }
};
template <Modulator kModulator, typename acc_t>
EF_HD acc_t soft_loss(acc_t x, acc_t t, const Parameters<acc_t>& p) {
  const Soft<kModulator, acc_t> f(x, t, p);
  return f.weight * f.cross_entropy;
}
template <Modulator kModulator, typename acc_t>
EF_HD acc_t soft_grad(acc_t x, acc_t t, const Parameters<acc_t>& p) {
  const Soft<kModulator, acc_t> f(x, t, p);
  return f.weight * (p.gamma * f.slope * f.cross_entropy + f.cross_entropy_grad);
}
}  // namespace ef::focal_loss
