// The choices that come from Python as numbers, and the limits that both sides check: the twin of effdet_fast/_choices.py. Each library
// tells its own in its build information (csrc/library.cpp) and is not loaded where Python's are others.
#pragma once
#include <cstdint>

// EF_CHOICE(name, values), numbered from 0. A BoxCoder says what the four deltas of a box are: the box itself, effdet's (ty, tx, th, tw)
// or torchvision's (dx, dy, dw, dh); a ForcedMatch, which anchors a box gets whatever the IoU.
#define EF_CHOICES(EF_CHOICE)                        \
  EF_CHOICE(Activation, kNone, kSilu, kRelu, kRelu6) \
  EF_CHOICE(BoxCoder, kNone, kEffdet, kTorchvision)  \
  EF_CHOICE(BoxLoss, kHuber, kL1, kSmoothL1, kGiou)  \
  EF_CHOICE(ForcedMatch, kNone, kFirst, kTies)       \
  EF_CHOICE(FusionMethod, kFast, kSoftmax, kSum)     \
  EF_CHOICE(LossNormalizer, kBatch, kPerImage)       \
  EF_CHOICE(NmsMethod, kHard, kGaussian, kLinear)    \
  EF_CHOICE(Resample, kNone, kNearest, kMaxPool)

// EF_LIMIT(name, value).
//   kMaxLevels         a pyramid that is trained: the convolution's and the loss's tables of levels travel with each launch
//   kMaxDecodedLevels  a pyramid that is only read, which may be another library's: that table is smaller
//   kMaxFusionInputs   of a node of a BiFPN
//   kMaxDetections     of an image, whose rows are counted in 32 bits
//   kMaxKeptInBlock    boxes that NMS keeps in the shared memory of one block
#define EF_LIMITS(EF_LIMIT)            \
  EF_LIMIT(kMaxLevels, 8)              \
  EF_LIMIT(kMaxDecodedLevels, 16)      \
  EF_LIMIT(kMaxFusionInputs, 4)        \
  EF_LIMIT(kMaxDetections, 1073741824) \
  EF_LIMIT(kMaxKeptInBlock, 1024)

namespace ef {
#define EF_CHOICE(name, ...)                                                    \
  enum class name : int { __VA_ARGS__ };                                        \
  constexpr int64_t count_of(name) {                                            \
    int64_t count = 1;                                                          \
    for (const char* text = #__VA_ARGS__; *text; ++text) count += *text == ','; \
    return count;                                                               \
  }
EF_CHOICES(EF_CHOICE)
#undef EF_CHOICE

#define EF_LIMIT(name, value) inline constexpr int name = value;
EF_LIMITS(EF_LIMIT)
#undef EF_LIMIT
}  // namespace ef
