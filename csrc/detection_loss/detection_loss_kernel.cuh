// Detection loss and its gradient, all levels and images in one launch; formulas in detection_loss_math.h and focal_loss_math.h.
// The work is cut into tiles of one image of one level, first those of the classes, then those of the boxes; a block takes every
// gridDim-th tile. A thread owns, in a tile of
//   classes, channels innermost   kSteps 16-byte vectors of logits; one may straddle anchors, so its first anchor and class come from
//                                 one division and are counted on from there
//   classes, pixels innermost     16 bytes of neighbouring pixels of one anchor, whose labels it keeps for kClasses classes
//   boxes                         one anchor
// Other strides, sizes and addresses take vectors of one element. Bytes per logit of size s: 2 s with the gradient, s without; labels
// add 8 / classes (pixels innermost: 8 / kClasses, of which all but the first reading come from the cache).
// Sums are per thread, per block in a fixed tree, then over the blocks' partials by one block: no atomics.
#pragma once
#include "../common/reduce.cuh"
#include "../common/vec.cuh"
#include "detection_loss.h"

namespace ef::detection_loss {
inline constexpr int kThreads = 256, kSteps = 4, kClasses = 16;

// How the levels are cut; parts 0 .. level_count - 1 are the classes', the next level_count the boxes'.
struct Tiles {
  int64_t end[2 * kMaxLevels];        // number of tiles up to and with the part
  int64_t per_image[2 * kMaxLevels];  // number of tiles of one image
  bool vectors[2 * kMaxLevels];       // whether the part is read in 16-byte vectors
  int64_t count;
};

template <Modulator kModulator, int kVec, typename scalar_t>
__device__ acc_t<scalar_t> channels_tile(const Problem<scalar_t>& p, const Level<scalar_t>& level, int64_t image, int64_t tile,
                                         acc_t<scalar_t> scale) {
  using A = acc_t<scalar_t>;
  const int64_t channels = p.per_cell * p.classes, n = level.pixels * channels;
  const scalar_t* x = level.cls.x + image * level.cls.image_stride;
  scalar_t* grad = level.cls.grad + image * n;
  const int64_t first_label = image * p.anchors + level.first_anchor;
  A sum = 0;
  for (int step = 0; step < kSteps; ++step) {
    const int64_t i = ((tile * kSteps + step) * kThreads + threadIdx.x) * kVec;
    if (i >= n) break;
    int64_t row = quotient(i, p.classes), column = i - row * p.classes;
    Vec<scalar_t, kVec> in, out;
    if constexpr (kVec > 1) {
      in = load_vec<kVec>(x + i);
    } else {
      const int64_t pixel = quotient(row, p.per_cell);
      in.v[0] = x[pixel * level.cls.pixel_stride + (i - pixel * channels) * level.cls.channel_stride];
    }
    int64_t label = p.labels[first_label + row];
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      if (column == p.classes) {
        column = 0;
        label = p.labels[first_label + ++row];
      }
      const Element<A> f = focal<kModulator>(A(in.v[k]), label == column++, label == -2, p.focal);
      sum += f.loss;
      out.v[k] = scalar_t(scale * f.grad);
    }
    if (p.with_grad) store_vec<kVec>(grad + i, out);
  }
  return sum;
}

template <Modulator kModulator, int kVec, typename scalar_t>
__device__ acc_t<scalar_t> pixels_tile(const Problem<scalar_t>& p, const Level<scalar_t>& level, int64_t image, int64_t tile,
                                       acc_t<scalar_t> scale) {
  using A = acc_t<scalar_t>;
  const int64_t runs = ceil_div(level.pixels, int64_t(kThreads) * kVec), groups = ceil_div(p.classes, int64_t(kClasses));
  const int64_t rest = quotient(tile, runs), anchor = quotient(rest, groups), group = rest - anchor * groups;
  const int64_t pixel = ((tile - rest * runs) * kThreads + threadIdx.x) * kVec;
  if (pixel >= level.pixels) return A(0);
  int64_t labels[kVec];
#pragma unroll
  for (int k = 0; k < kVec; ++k) labels[k] = p.labels[image * p.anchors + level.first_anchor + (pixel + k) * p.per_cell + anchor];
  const int64_t last = group * kClasses + kClasses < p.classes ? group * kClasses + kClasses : p.classes;
  A sum = 0;
  for (int64_t label = group * kClasses; label < last; ++label) {
    const int64_t channel = anchor * p.classes + label;
    const scalar_t* x = level.cls.x + image * level.cls.image_stride + channel * level.cls.channel_stride + pixel * level.cls.pixel_stride;
    const Vec<scalar_t, kVec> in = load_vec<kVec>(x);
    Vec<scalar_t, kVec> out;
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      const Element<A> f = focal<kModulator>(A(in.v[k]), labels[k] == label, labels[k] == -2, p.focal);
      sum += f.loss;
      out.v[k] = scalar_t(scale * f.grad);
    }
    if (p.with_grad) store_vec<kVec>(level.cls.grad + (image * p.per_cell * p.classes + channel) * level.pixels + pixel, out);
  }
  return sum;
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
  A codes[4], targets[4], anchor[4] = {}, slope[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    codes[k] = A(box.x[image * box.image_stride + (channel + k) * box.channel_stride + pixel * box.pixel_stride]);
    targets[k] = p.box_targets[4 * i + k];
    if (p.anchor_boxes) anchor[k] = p.anchor_boxes[4 * of_image + k];
  }
  const int64_t label = p.labels[i];
  const A loss = box_loss(codes, targets, anchor, label >= 0 && label < p.classes, p.box, slope);
  if (p.with_grad) {
    scalar_t* grad = box.grad + image * channels * level.pixels;
#pragma unroll
    for (int k = 0; k < 4; ++k)
      grad[box.channels_last ? pixel * channels + channel + k : (channel + k) * level.pixels + pixel] = scalar_t(scale * slope[k]);
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
  if (p.normalizer == Normalizer::kBatch) {
    for (int64_t i = threadIdx.x; i < p.positive_count; i += kThreads) factor += p.positives[i];
    factor = block_sum(factor, scratch);
    if (threadIdx.x == 0) scratch[kWarpSize] = factor;
    __syncthreads();
    factor = batch_factor(scratch[kWarpSize]);
  }
  const A cls_upstream = cls_scale(p), box_upstream = box_scale(p);
  A cls = 0, box = 0;
  for (int64_t tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
    int part = 0;
    while (tile >= tiles.end[part]) ++part;
    const bool of_boxes = part >= p.level_count;
    const Level<scalar_t>& level = p.levels[of_boxes ? part - p.level_count : part];
    const int64_t local = tile - (part ? tiles.end[part - 1] : 0), image = quotient(local, tiles.per_image[part]);
    const int64_t of_image = local - image * tiles.per_image[part];
    if (p.normalizer == Normalizer::kPerImage) factor = image_factor(p.positives[image], p.images);
    if (of_boxes) {
      box += factor * boxes_tile(p, level, image, of_image, factor * box_upstream);
    } else if (level.cls.channels_last) {
      const A scale = factor * cls_upstream;
      cls += factor * (tiles.vectors[part] ? channels_tile<kModulator, kVec>(p, level, image, of_image, scale)
                                           : channels_tile<kModulator, 1>(p, level, image, of_image, scale));
    } else {
      const A scale = factor * cls_upstream;
      cls += factor * (tiles.vectors[part] ? pixels_tile<kModulator, kVec>(p, level, image, of_image, scale)
                                           : pixels_tile<kModulator, 1>(p, level, image, of_image, scale));
    }
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
      for (int k = 0; k < kVec; ++k) value.v[k] = scalar_t(factor * A(value.v[k]));
      store_vec<kVec>(grad + i, value);
    } else {
      for (int64_t k = i; k < n; ++k) grad[k] = scalar_t(factor * A(grad[k]));
    }
  }
}
}  // namespace ef::detection_loss
