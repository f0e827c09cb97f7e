#include <algorithm>

#include "../common/platform.h"
#include "detection_loss.h"
#include "detection_loss_kernel.cuh"

namespace ef::detection_loss {
namespace {
constexpr int64_t kMaxBlocks = 132 * 8;  // fills the largest part; fixed, so that a sum has the same bits on every device

// Whether every vector of a level's logits, and of their gradient, is whole and aligned.
template <typename scalar_t>
bool takes_vectors(const Problem<scalar_t>& p, const Level<scalar_t>& level) {
  constexpr int64_t kVec = kVecSize<scalar_t>;
  const Output<scalar_t>& cls = level.cls;
  const int64_t channels = p.per_cell * p.classes, n = channels * level.pixels;
  const bool images_fit = is_vec_aligned(cls.x, cls.grad) && n % kVec == 0 && (p.images == 1 || cls.image_stride % kVec == 0);
  if (cls.channels_last)
    return images_fit && p.classes < focal_loss::kMaxClasses && cls.channel_stride == 1 &&
           (level.pixels == 1 || cls.pixel_stride == channels);
  return images_fit && cls.pixel_stride == 1 && level.pixels % kVec == 0 && cls.channel_stride % kVec == 0;
}

template <typename scalar_t>
Tiles tiles_of(const Problem<scalar_t>& p) {
  Tiles tiles{};
  for (int part = 0; part < 2 * p.level_count; ++part) {
    const bool of_boxes = part >= p.level_count;
    const Level<scalar_t>& level = p.levels[of_boxes ? part - p.level_count : part];
    tiles.vectors[part] = !of_boxes && takes_vectors(p, level);
    const int64_t vec = tiles.vectors[part] ? kVecSize<scalar_t> : 1;
    if (of_boxes) {
      tiles.per_image[part] = ceil_div(level.pixels * p.per_cell, kThreads);
    } else if (level.cls.channels_last) {
      tiles.per_image[part] = ceil_div(level.pixels * p.per_cell * p.classes, kThreads * kSteps * vec);
    } else {
      tiles.per_image[part] = ceil_div(level.pixels, kThreads * vec) * ceil_div(p.classes, kClasses) * p.per_cell;
    }
    tiles.count += tiles.per_image[part] * p.images;
    tiles.end[part] = tiles.count;
  }
  return tiles;
}
}  // namespace

template <typename scalar_t>
int64_t partial_count(Cuda, const Problem<scalar_t>&) {
  return kMaxBlocks;
}

template <typename scalar_t>
void launch_detection_loss(Cuda device, const Problem<scalar_t>& p, acc_t<scalar_t>* partials, Losses<acc_t<scalar_t>> losses) {
  using A = acc_t<scalar_t>;
  const Tiles tiles = tiles_of(p);
  const int64_t blocks = std::min(kMaxBlocks, tiles.count);
  if (blocks > 0) {
    focal_loss::dispatch_modulator(p.gamma, [&]<Modulator kModulator>() {
      launch("detection_loss", detection_loss_kernel<kModulator, scalar_t>, unsigned(blocks), kThreads, 4 * kWarpSize * sizeof(A), device,
             p, tiles, partials);
    });
  }
  if (losses.total) {
    launch("detection_loss_sum", detection_loss_sum_kernel<A>, 1, kThreads, 2 * kWarpSize * sizeof(A), device, partials, blocks,
           p.box_loss_weight, losses);
  }
}

template <typename scalar_t>
void launch_rescale(Cuda device, const Gradients<scalar_t>& g) {
  int64_t largest = 0;
  bool aligned = true;
  for (int i = 0; i < g.levels; ++i) {
    largest = std::max(largest, g.count[i]);
    aligned = aligned && is_vec_aligned(g.grad[i]);
  }
  if (largest == 0) return;
  const auto with_vectors = [&]<int kVec>() {
    const auto blocks = unsigned(std::min(kMaxBlocks, ceil_div(largest, int64_t(kThreads) * kVec)));
    launch("detection_loss_rescale", detection_loss_rescale_kernel<kVec, scalar_t>, dim3(blocks, unsigned(g.levels)), kThreads, 0, device,
           g);
  };
  aligned ? with_vectors.template operator()<kVecSize<scalar_t>>() : with_vectors.template operator()<1>();
}

#define EF_DEFINE(scalar_t)                                                                                                 \
  template int64_t partial_count<scalar_t>(Cuda, const Problem<scalar_t>&);                                                 \
  template void launch_detection_loss<scalar_t>(Cuda, const Problem<scalar_t>&, acc_t<scalar_t>*, Losses<acc_t<scalar_t>>); \
  template void launch_rescale<scalar_t>(Cuda, const Gradients<scalar_t>&);
EF_FOR_EACH_FLOATING(EF_DEFINE)
#undef EF_DEFINE
}  // namespace ef::detection_loss
