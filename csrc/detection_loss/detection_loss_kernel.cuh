// Detection loss and its gradient, all levels and images in one launch; formulas in detection_loss_math.h and focal_loss_math.h.
// The work is cut into tiles of one image of one level, first those of the classes, then those of the boxes; a block takes every
// gridDim-th tile. A thread owns, in a tile of
//   classes, channels innermost   kSteps 16-byte vectors of logits; one may straddle anchors. Their first anchor and class come from one
//                                 division and are stepped from there
//   classes, pixels innermost     16 bytes of neighboring pixels of one anchor, whose labels it keeps for kClasses classes
//   boxes                         one anchor
// Vectors of nothing but background, nearly all, take a shorter way (focal_loss_vector.cuh). Other strides, sizes and addresses, and
// 2^30 classes, take vectors of one element. Bytes per logit of size s: 2 s with the gradient, s without; labels add 8 / classes (pixels
// innermost: 8 / kClasses, of which all but the first reading come from the cache).
// Sums are per thread, per block in a fixed tree, then over the blocks' partials by one block: no atomics.
#pragma once
#include "../common/launch.cuh"
#include "../common/vec.cuh"
#include "../focal_loss/focal_loss_vector.cuh"
#include "detection_loss.h"

namespace ef::detection_loss {
using focal_loss::all_background;
using focal_loss::background;
using focal_loss::Marks;
using focal_loss::Stride;
inline constexpr int kThreads = 256, kSteps = 4, kClasses = 16;

// How the levels are cut; parts 0 .. level_count - 1 are the classes', the next level_count the boxes'.
struct Tiles {
  int64_t end[2 * kMaxLevels];        // number of tiles up to and with the part
  int64_t per_image[2 * kMaxLevels];  // number of tiles of one image
  bool vectors[2 * kMaxLevels];       // whether the part is read in 16-byte vectors
  int64_t count;
};

// The logits of a vector whatever their labels: the sum of their losses, and their gradients. weight(k): of the class of logit k.
template <Modulator kModulator, int kVec, typename scalar_t, class Weight>
__device__ acc_t<scalar_t> labeled(const Vec<scalar_t, kVec>& x, const Marks& marks, const focal_loss::Parameters<acc_t<scalar_t>>& p,
                                   const Weight& weight, acc_t<scalar_t> scale, Vec<scalar_t, kVec>& grad) {
  using A = acc_t<scalar_t>;
  A sum = 0;
#pragma unroll
  for (int k = 0; k < kVec; ++k) {
    const Element<A> f = focal<kModulator>(A(x.v[k]), (marks.positive >> k & 1) != 0, (marks.ignored >> k & 1) != 0, p);
    sum += weight(k) * f.loss;
    grad.v[k] = scalar_t(weight(k) * scaled(scale, f.grad));
  }
  return sum;
}

template <Modulator kModulator, int kVec, typename scalar_t, typename label_t>
__device__ acc_t<scalar_t> channels_tile(const Problem<scalar_t>& p, const Level<scalar_t>& level, const label_t* labels,
                                         const Stride& stride, int64_t image, int64_t tile, acc_t<scalar_t> scale) {
  using A = acc_t<scalar_t>;
  const int classes = int(p.classes);
  const int64_t n = level.pixels * p.per_cell * classes, first = (tile * kSteps * kThreads + threadIdx.x) * kVec;
  const scalar_t* x = level.cls.x + image * level.cls.image_stride + first;
  scalar_t* grad = level.cls.grad + image * n + first;
  const focal_loss::Slope<A> slope(p.focal, scale * p.focal.alpha_negative);
  auto at = focal_loss::Place<label_t, int>::of(labels + image * p.anchors + level.first_anchor, first, p.classes);
  const int64_t left = ceil_div(n - first, int64_t(kThreads * kVec));
  const int steps = left < kSteps ? int(left) : kSteps;
  A of_background = 0, of_labeled = 0;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const Vec<scalar_t, kVec> in = load_vec<kVec>(x);
    Vec<scalar_t, kVec> out;
    if (!p.class_weight && all_background<kVec>(at, classes)) {
      of_background += background<kModulator>(in, p.focal, slope, out);
    } else {
      const auto weight = [&](int k) { return class_weight_at(p.class_weight, at.column + k, classes); };
      of_labeled += labeled<kModulator>(in, focal_loss::marks_of<kVec>(at, classes), p.focal, weight, scale, out);
    }
    if (p.with_grad) store_vec<kVec>(grad, out);
    x += kThreads * kVec;
    grad += kThreads * kVec;
    at.advance(stride, classes);
  }
  return p.focal.alpha_negative * of_background + of_labeled;
}

// The same logit by logit, with any strides.
template <Modulator kModulator, typename scalar_t>
__device__ acc_t<scalar_t> single_channels_tile(const Problem<scalar_t>& p, const Level<scalar_t>& level, int64_t image, int64_t tile,
                                                acc_t<scalar_t> scale) {
  using A = acc_t<scalar_t>;
  const int64_t channels = p.per_cell * p.classes, n = level.pixels * channels;
  A sum = 0;
  for (int step = 0; step < kSteps; ++step) {
    const int64_t i = (tile * kSteps + step) * kThreads + threadIdx.x;
    if (i >= n) break;
    const int64_t row = quotient(i, p.classes), pixel = quotient(row, p.per_cell);
    const int64_t label = p.labels[image * p.anchors + level.first_anchor + row];
    const scalar_t x =
        level.cls.x[image * level.cls.image_stride + pixel * level.cls.pixel_stride + (i - pixel * channels) * level.cls.channel_stride];
    const int64_t column = i - row * p.classes;
    const Element<A> f = focal<kModulator>(A(x), label == column, label == -2, p.focal);
    const A weight = class_weight_at(p.class_weight, column, p.classes);
    sum += weight * f.loss;
    if (p.with_grad) level.cls.grad[image * n + i] = scalar_t(weight * scaled(scale, f.grad));
  }
  return sum;
}

template <Modulator kModulator, int kVec, typename scalar_t>
__device__ acc_t<scalar_t> pixels_tile(const Problem<scalar_t>& p, const Level<scalar_t>& level, int64_t image, int64_t tile,
                                       acc_t<scalar_t> scale) {
  using A = acc_t<scalar_t>;
  const int64_t runs = ceil_div(level.pixels, int64_t(kThreads) * kVec), groups = ceil_div(p.classes, int64_t(kClasses));
  const int64_t rest = quotient(tile, runs), anchor = quotient(rest, groups), first = (rest - anchor * groups) * kClasses;
  const int64_t pixel = ((tile - rest * runs) * kThreads + threadIdx.x) * kVec;
  if (pixel >= level.pixels) return A(0);
  uint32_t positive[kVec], ignored = 0, special = 0;  // a bit for each class; for each pixel; for each class that is not all background
#pragma unroll
  for (int k = 0; k < kVec; ++k) {
    const int64_t label = p.labels[image * p.anchors + level.first_anchor + (pixel + k) * p.per_cell + anchor];
    positive[k] = label >= first && label < first + kClasses ? 1u << (label - first) : 0u;
    special |= label == -2 ? ~0u : positive[k];
    ignored |= uint32_t(label == -2) << k;
  }
  const int64_t channel = anchor * p.classes + first;
  const scalar_t* x = level.cls.x + image * level.cls.image_stride + channel * level.cls.channel_stride + pixel * level.cls.pixel_stride;
  scalar_t* grad = level.cls.grad + (image * p.per_cell * p.classes + channel) * level.pixels + pixel;
  const focal_loss::Slope<A> slope(p.focal, scale * p.focal.alpha_negative);
  const int count = p.classes - first < kClasses ? int(p.classes - first) : kClasses;
  A of_background = 0, of_labeled = 0;
#pragma unroll 1
  for (int c = 0; c < count; ++c) {
    const Vec<scalar_t, kVec> in = load_vec<kVec>(x);
    Vec<scalar_t, kVec> out;
    if (!p.class_weight && (special >> c & 1) == 0) {
      of_background += background<kModulator>(in, p.focal, slope, out);
    } else {
      Marks marks{0, ignored};
#pragma unroll
      for (int k = 0; k < kVec; ++k) marks.positive |= (positive[k] >> c & 1) << k;
      const A weight = class_weight_at(p.class_weight, first + c, p.classes);
      of_labeled += labeled<kModulator>(in, marks, p.focal, [&](int) { return weight; }, scale, out);
    }
    if (p.with_grad) store_vec<kVec>(grad, out);
    x += level.cls.channel_stride;
    grad += level.pixels;
  }
  return p.focal.alpha_negative * of_background + of_labeled;
}

template <typename scalar_t>
__device__ acc_t<scalar_t> boxes_tile(const Problem<scalar_t>& p, const Level<scalar_t>& level, int64_t image, int64_t tile,
                                      acc_t<scalar_t> scale) {
  using A = acc_t<scalar_t>;
  const Output<scalar_t>& box = level.box;
  const int64_t of_level = tile * kThreads + threadIdx.x, channels = 4 * p.per_cell;
  if (of_level >= level.pixels * p.per_cell) return A(0);
  const int64_t pixel = quotient(of_level, p.per_cell), channel = 4 * (of_level - pixel * p.per_cell);
  const int64_t of_image = level.first_anchor + of_level, i = image * p.anchors + of_image;
  A deltas[4], targets[4], anchor[4] = {}, slope[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    deltas[k] = A(box.x[image * box.image_stride + (channel + k) * box.channel_stride + pixel * box.pixel_stride]);
    targets[k] = p.box_targets[4 * i + k];
    if (p.anchor_boxes) anchor[k] = p.anchor_boxes[4 * of_image + k];
  }
  const int64_t label = p.labels[i];
  const A loss = box_loss(deltas, targets, anchor, label >= 0 && label < p.classes, p.box, slope);
  if (p.with_grad) {
    scalar_t* grad = box.grad + image * channels * level.pixels;
#pragma unroll
    for (int k = 0; k < 4; ++k)
      grad[box.channels_last ? pixel * channels + channel + k : (channel + k) * level.pixels + pixel] = scalar_t(scaled(scale, slope[k]));
  }
  return loss;
}

// Shared memory: four times one value per warp.
template <Modulator kModulator, typename scalar_t>
__global__ void detection_loss_kernel(Problem<scalar_t> p, Tiles tiles,
                                      acc_t<scalar_t>* __restrict__ partials) {  // [gridDim.x, 2]
  using A = acc_t<scalar_t>;
  constexpr int kVec = kVecSize<scalar_t>;
  A* scratch = shared_memory<A>();
  A factor = 0;
  if (p.normalizer == LossNormalizer::kBatch) {
    for (int64_t i = threadIdx.x; i < p.positive_count; i += kThreads) factor += p.positives[i];
    factor = block_sum(factor, scratch);
    if (threadIdx.x == 0) scratch[kWarpSize] = factor;
    __syncthreads();
    factor = batch_factor(scratch[kWarpSize]);
  }
  const A cls_upstream = cls_scale(p), box_upstream = box_scale(p);
  const auto stride = Stride::of(kThreads * kVec, p.classes);  // from one vector of a thread to the next
  A cls = 0, box = 0;
  for (int64_t tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
    int part = 0;
    while (tile >= tiles.end[part]) ++part;
    const bool of_boxes = part >= p.level_count;
    const Level<scalar_t>& level = p.levels[of_boxes ? part - p.level_count : part];
    const int64_t local = tile - (part ? tiles.end[part - 1] : 0), image = quotient(local, tiles.per_image[part]);
    const int64_t of_image = local - image * tiles.per_image[part];
    if (p.normalizer == LossNormalizer::kPerImage) factor = image_factor(p.positives[image], p.images);
    if (of_boxes) {
      box += factor * boxes_tile(p, level, image, of_image, factor * box_upstream);
      continue;
    }
    const A scale = factor * cls_upstream;
    A sum;
    if (!level.cls.channels_last) {
      sum = tiles.vectors[part] ? pixels_tile<kModulator, kVec>(p, level, image, of_image, scale)
                                : pixels_tile<kModulator, 1>(p, level, image, of_image, scale);
    } else if (!tiles.vectors[part]) {
      sum = single_channels_tile<kModulator>(p, level, image, of_image, scale);
    } else {
      sum = p.labels.wide ? channels_tile<kModulator, kVec>(p, level, p.labels.wide, stride, image, of_image, scale)
                          : channels_tile<kModulator, kVec>(p, level, p.labels.narrow, stride, image, of_image, scale);
    }
    cls += factor * sum;
  }
  cls = block_sum(cls, scratch + 2 * kWarpSize);
  box = block_sum(box, scratch + 3 * kWarpSize);
  if (threadIdx.x == 0) {
    partials[2 * blockIdx.x] = cls;
    partials[2 * blockIdx.x + 1] = box;
  }
}

// One block adds the partials in an order that depends on their number only.
template <typename A>
__global__ void detection_loss_sum_kernel(const A* __restrict__ partials,  // [count, 2]
                                          int64_t count, A box_loss_weight, Losses<A> losses) {
  A cls = 0, box = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    cls += partials[2 * i];
    box += partials[2 * i + 1];
  }
  A* scratch = shared_memory<A>();
  cls = block_sum(cls, scratch);
  box = block_sum(box, scratch + kWarpSize);
  if (threadIdx.x == 0) {
    *losses.total = cls + box_loss_weight * box;
    *losses.cls = cls;
    *losses.box = box;
  }
}

// blockIdx.y is the gradient. Where the factor is 1 nothing is read.
template <int kVec, typename scalar_t>
__global__ void detection_loss_rescale_kernel(Gradients<scalar_t> g) {
  using A = acc_t<scalar_t>;
  const A factor = rescale_factor(g, int(blockIdx.y));
  if (factor == A(1)) return;
  scalar_t* grad = g.grad[blockIdx.y];
  const int64_t n = g.count[blockIdx.y], stride = int64_t(gridDim.x) * kThreads * kVec;
  for (int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kVec; i < n; i += stride) {
    if (i + kVec <= n) {
      Vec<scalar_t, kVec> value = load_vec<kVec>(grad + i);
#pragma unroll
      for (int k = 0; k < kVec; ++k) value.v[k] = scalar_t(scaled(factor, A(value.v[k])));
      store_vec<kVec>(grad + i, value);
    } else {
      for (int64_t k = i; k < n; ++k) grad[k] = scalar_t(scaled(factor, A(grad[k])));
    }
  }
}
}  // namespace ef::detection_loss
