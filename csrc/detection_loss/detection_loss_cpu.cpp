// A unit is a run of pixels of one level of one image: of all anchors where the channels are innermost, of one anchor where the pixels
// are. There, rows of classes of neighboring background anchors make one long loop, and the few positives are done by themselves;
// here, each class is a loop over pixels that compares their labels. Threads take the next unit when they are done with one, as units
// differ in size; sums are kept per unit and added in order, so the result does not depend on the threads.
#include <algorithm>
#include <atomic>
#include <vector>

#include "../common/parallel.h"
#include "../common/platform.h"
#include "detection_loss.h"

namespace ef::detection_loss {
namespace {
using focal_loss::hard_loss_and_grad;

constexpr int64_t kChunk = 1 << 13;  // logits of a unit with the channels innermost
constexpr int64_t kPixels = 1024;    // pixels of a unit with the pixels innermost

// A dense run of background logits, of one row if classes have weights. Returns the sum of the losses without alpha.
template <Modulator kModulator, bool kGrad, class Weight, typename scalar_t>
EF_CPU_CLONES acc_t<scalar_t> background_run(const scalar_t* __restrict x, const Weight weight, int64_t m,
                                             const focal_loss::Parameters<acc_t<scalar_t>> p, acc_t<scalar_t> scale,
                                             scalar_t* __restrict grad) {
  using A = acc_t<scalar_t>;
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < m; ++i) {
    const auto f = hard_loss_and_grad<kModulator>(A(x[i]), p);
    sum += weight[i] * f.loss;
    if constexpr (kGrad) grad[i] = scalar_t(weight[i] * (scale * f.grad));
  }
  return sum;
}

// One class of one anchor at m neighboring pixels. Returns the sum of the losses.
template <Modulator kModulator, bool kGrad, typename scalar_t>
EF_CPU_CLONES acc_t<scalar_t> pixel_run(const scalar_t* __restrict x, const int32_t* __restrict labels, int32_t label, int64_t m,
                                        const focal_loss::Parameters<acc_t<scalar_t>> p, acc_t<scalar_t> scale, scalar_t* __restrict grad) {
  using A = acc_t<scalar_t>;
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < m; ++j) {
    const Element<A> f = focal<kModulator>(A(x[j]), labels[j] == label, labels[j] == -2, p);
    sum += f.loss;
    if constexpr (kGrad) grad[j] = scalar_t(scaled(scale, f.grad));
  }
  return sum;
}

// Huber loss of a dense run of deltas.
template <bool kGrad, typename scalar_t>
EF_CPU_CLONES acc_t<scalar_t> huber_run(const scalar_t* __restrict deltas, const acc_t<scalar_t>* __restrict targets, int64_t m,
                                        acc_t<scalar_t> delta, acc_t<scalar_t> scale, scalar_t* __restrict grad) {
  using A = acc_t<scalar_t>;
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < m; ++i) {
    const Element<A> f = huber(A(deltas[i]), targets[i], delta);
    sum += f.loss;
    if constexpr (kGrad) grad[i] = scalar_t(scaled(scale, f.grad));
  }
  return sum;
}

template <typename scalar_t>
EF_CPU_CLONES void scale_run(scalar_t* __restrict x, int64_t m, acc_t<scalar_t> factor) {
  for (int64_t i = 0; i < m; ++i) x[i] = scalar_t(scaled(factor, acc_t<scalar_t>(x[i])));
}

struct Unit {
  int level;
  int64_t image, first_pixel, last_pixel, first_anchor, last_anchor;  // anchors: of a cell
};

template <typename scalar_t>
struct Units {
  const Problem<scalar_t>& p;
  int64_t pixel_step(const Level<scalar_t>& level) const {
    return level.cls.channels_last ? std::max<int64_t>(1, kChunk / std::max<int64_t>(1, p.per_cell * p.classes)) : kPixels;
  }
  int64_t per_image(const Level<scalar_t>& level) const {
    return ceil_div(level.pixels, pixel_step(level)) * (level.cls.channels_last ? 1 : p.per_cell);
  }
  int64_t count() const {
    int64_t sum = 0;
    for (int i = 0; i < p.level_count; ++i) sum += p.images * per_image(p.levels[i]);
    return sum;
  }
  Unit operator[](int64_t i) const {
    int level = 0;
    while (i >= p.images * per_image(p.levels[level])) i -= p.images * per_image(p.levels[level++]);
    const Level<scalar_t>& at = p.levels[level];
    const int64_t step = pixel_step(at), image = i / per_image(at), rest = i % per_image(at);
    const int64_t runs = ceil_div(at.pixels, step), first = rest % runs * step, last = std::min(at.pixels, first + step);
    if (at.cls.channels_last) return {level, image, first, last, 0, p.per_cell};
    return {level, image, first, last, rest / runs, rest / runs + 1};
  }
};

template <typename scalar_t>
const scalar_t* input_at(const Output<scalar_t>& output, int64_t image, int64_t channel, int64_t pixel) {
  return output.x + image * output.image_stride + channel * output.channel_stride + pixel * output.pixel_stride;
}
// The gradient of an output with `channels` channels is dense.
template <typename scalar_t>
scalar_t* grad_at(const Output<scalar_t>& output, int64_t channels, int64_t pixels, int64_t image, int64_t channel, int64_t pixel) {
  if (!output.grad) return nullptr;
  return output.grad + image * channels * pixels + (output.channels_last ? pixel * channels + channel : channel * pixels + pixel);
}

// `rows` dense rows of classes, of anchors that follow each other.
template <Modulator kModulator, bool kGrad, typename scalar_t>
double class_rows(const Problem<scalar_t>& p, const scalar_t* x, int64_t first_label, int64_t rows, acc_t<scalar_t> scale, scalar_t* grad) {
  using A = acc_t<scalar_t>;
  const int64_t c = p.classes;
  const A negative = p.focal.alpha_negative, positive = p.focal.alpha_positive;
  const auto part = [&](const auto& weight, int64_t begin, int64_t end) {
    const A sum =
        background_run<kModulator, kGrad>(x + begin, weight, end - begin, p.focal, scale * negative, kGrad ? grad + begin : nullptr);
    return double(negative) * sum;
  };
  const auto run = [&](int64_t begin, int64_t end) {
    if (!p.class_weight) return part(focal_loss::NoClassWeight<A>{}, begin, end);
    double sum = 0;
    for (int64_t next; begin < end; begin = next) {
      next = std::min(end, (begin / c + 1) * c);
      sum += part(p.class_weight + begin % c, begin, next);
    }
    return sum;
  };
  double sum = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t begin = row;
    int64_t label = -1;
    for (; row < rows; ++row) {
      label = p.labels[first_label + row];
      if (label == -2 || (label >= 0 && label < c)) break;
    }
    if (row > begin) sum += run(begin * c, row * c);
    if (row == rows) break;
    if (label == -2) {
      if constexpr (kGrad) std::fill_n(grad + row * c, c, scalar_t(0.f));
      continue;
    }
    const int64_t at = row * c + label;
    const auto f = hard_loss_and_grad<kModulator>(-A(x[at]), p.focal);
    const A weight = class_weight_at(p.class_weight, label, p.classes);
    sum += run(row * c, at) + run(at + 1, row * c + c) + double(weight) * (double(positive) * f.loss);
    if constexpr (kGrad) grad[at] = scalar_t(weight * (-scale * positive * f.grad));
  }
  return sum;
}

template <Modulator kModulator, bool kGrad, typename scalar_t>
double class_loss(const Problem<scalar_t>& p, const Unit& unit, acc_t<scalar_t> scale) {
  const Level<scalar_t>& level = p.levels[unit.level];
  const int64_t channels = p.per_cell * p.classes;
  const int64_t first_label = unit.image * p.anchors + level.first_anchor + unit.first_pixel * p.per_cell;
  double sum = 0;
  if (level.cls.channels_last) {
    const bool dense = level.cls.pixel_stride == channels;
    const int64_t step = dense ? unit.last_pixel - unit.first_pixel : 1;
    for (int64_t pixel = unit.first_pixel; pixel < unit.last_pixel; pixel += step) {
      sum +=
          class_rows<kModulator, kGrad>(p, input_at(level.cls, unit.image, 0, pixel), first_label + (pixel - unit.first_pixel) * p.per_cell,
                                        step * p.per_cell, scale, grad_at(level.cls, channels, level.pixels, unit.image, 0, pixel));
    }
    return sum;
  }
  int32_t labels[kPixels];
  const int64_t m = unit.last_pixel - unit.first_pixel;
  for (int64_t j = 0; j < m; ++j) {
    const int64_t label = p.labels[first_label + j * p.per_cell + unit.first_anchor];
    labels[j] = int32_t(label >= -2 && label < p.classes ? label : -1);
  }
  for (int64_t c = 0; c < p.classes; ++c) {
    const int64_t channel = unit.first_anchor * p.classes + c;
    const acc_t<scalar_t> weight = class_weight_at(p.class_weight, c, p.classes);
    sum += double(weight) * pixel_run<kModulator, kGrad>(input_at(level.cls, unit.image, channel, unit.first_pixel), labels, int32_t(c), m,
                                                         p.focal, weight * scale,
                                                         grad_at(level.cls, channels, level.pixels, unit.image, channel, unit.first_pixel));
  }
  return sum;
}

template <bool kGrad, typename scalar_t>
double box_loss_of(const Problem<scalar_t>& p, const Unit& unit, acc_t<scalar_t> scale) {
  using A = acc_t<scalar_t>;
  const Level<scalar_t>& level = p.levels[unit.level];
  const Output<scalar_t>& box = level.box;
  const int64_t channels = 4 * p.per_cell, m = unit.last_pixel - unit.first_pixel;
  const int64_t first = unit.image * p.anchors + level.first_anchor;
  if (p.box.loss == BoxLoss::kHuber && box.channels_last && box.pixel_stride == channels && level.cls.channels_last) {
    return huber_run<kGrad>(input_at(box, unit.image, 0, unit.first_pixel), p.box_targets + (first + unit.first_pixel * p.per_cell) * 4,
                            m * channels, p.box.delta, scale, grad_at(box, channels, level.pixels, unit.image, 0, unit.first_pixel));
  }
  double sum = 0;
  const int64_t grad_step = box.channels_last ? 1 : level.pixels;
  for (int64_t pixel = unit.first_pixel; pixel < unit.last_pixel; ++pixel) {
    for (int64_t a = unit.first_anchor; a < unit.last_anchor; ++a) {
      const int64_t of_image = level.first_anchor + pixel * p.per_cell + a, i = unit.image * p.anchors + of_image;
      const scalar_t* x = input_at(box, unit.image, 4 * a, pixel);
      A deltas[4], slope[4];
      for (int k = 0; k < 4; ++k) deltas[k] = A(x[k * box.channel_stride]);
      const A* anchor = p.anchor_boxes ? p.anchor_boxes + 4 * of_image : nullptr;
      const bool positive = p.labels[i] >= 0 && p.labels[i] < p.classes;
      sum += box_loss(deltas, p.box_targets + 4 * i, anchor, positive, p.box, slope);
      if constexpr (kGrad) {
        scalar_t* grad = grad_at(box, channels, level.pixels, unit.image, 4 * a, pixel);
        for (int k = 0; k < 4; ++k) grad[k * grad_step] = scalar_t(scaled(scale, slope[k]));
      }
    }
  }
  return sum;
}

// For each image what its sums are multiplied by.
template <typename scalar_t>
std::vector<acc_t<scalar_t>> factors_of(const Problem<scalar_t>& p) {
  using A = acc_t<scalar_t>;
  std::vector<A> factors(p.images);
  if (p.normalizer == LossNormalizer::kPerImage) {
    for (int64_t i = 0; i < p.images; ++i) factors[i] = image_factor(p.positives[i], p.images);
  } else {
    A all = 0;
    for (int64_t i = 0; i < p.positive_count; ++i) all += p.positives[i];
    std::fill(factors.begin(), factors.end(), batch_factor(all));
  }
  return factors;
}
}  // namespace

template <typename scalar_t>
int64_t partial_count(Cpu, const Problem<scalar_t>& p) {
  return Units<scalar_t>{p}.count();
}

template <typename scalar_t>
void launch_detection_loss(Cpu, const Problem<scalar_t>& p, acc_t<scalar_t>* partials, Losses<acc_t<scalar_t>> losses) {
  using A = acc_t<scalar_t>;
  const std::vector<A> factors = factors_of(p);
  const Units<scalar_t> units{p};
  const int64_t count = units.count();
  const bool few = p.images * p.anchors * p.classes < 2 * kChunk;
  std::atomic<int64_t> next = 0;
  focal_loss::dispatch_modulator(p.gamma, [&]<Modulator kModulator>() {
    const auto work = [&]<bool kGrad>() {
      parallel_for(count, few ? count : 1, [&](int64_t, int64_t) {
        for (int64_t i = next++; i < count; i = next++) {
          const Unit unit = units[i];
          const A factor = factors[unit.image];
          partials[2 * i] = A(factor * class_loss<kModulator, kGrad>(p, unit, factor * cls_scale(p)));
          partials[2 * i + 1] = A(factor * box_loss_of<kGrad>(p, unit, factor * box_scale(p)));
        }
      });
    };
    p.with_grad ? work.template operator()<true>() : work.template operator()<false>();
  });
  if (!losses.total) return;
  double cls = 0, box = 0;
  for (int64_t i = 0; i < count; ++i) {
    cls += partials[2 * i];
    box += partials[2 * i + 1];
  }
  *losses.total = A(cls + p.box_loss_weight * box);
  *losses.cls = A(cls);
  *losses.box = A(box);
}

template <typename scalar_t>
void launch_rescale(Cpu, const Gradients<scalar_t>& g) {
  for (int i = 0; i < g.levels; ++i) {
    const acc_t<scalar_t> factor = rescale_factor(g, i);
    if (factor == 1) continue;
    parallel_for(g.count[i], 4 * kChunk, [&](int64_t begin, int64_t end) { scale_run(g.grad[i] + begin, end - begin, factor); });
  }
}

#define EF_DEFINE(scalar_t)                                                                                                \
  template int64_t partial_count<scalar_t>(Cpu, const Problem<scalar_t>&);                                                 \
  template void launch_detection_loss<scalar_t>(Cpu, const Problem<scalar_t>&, acc_t<scalar_t>*, Losses<acc_t<scalar_t>>); \
  template void launch_rescale<scalar_t>(Cpu, const Gradients<scalar_t>&);
EF_FOR_EACH_FLOATING(EF_DEFINE)
#undef EF_DEFINE
}  // namespace ef::detection_loss
