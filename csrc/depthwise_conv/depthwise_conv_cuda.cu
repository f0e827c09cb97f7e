#include "depthwise_conv_launch.cuh"

namespace ef::depthwise_conv {
namespace {
constexpr int64_t kWeightBlocks = 1056;  // fills the largest part; fixed, so that a sum has the same bits on every device
constexpr int64_t kMinChunkPositions = 512;
}  // namespace

int64_t chunk_count(Cuda, const Shape& s) {
  const int64_t blocks = s.channels_last ? ceil_div(s.c, kWeightChannels) : s.c;
  const int64_t max_chunks = std::min(s.n * s.oh, std::max<int64_t>(1, s.n * s.oh * s.ow / kMinChunkPositions));
  return std::clamp<int64_t>(kWeightBlocks / blocks, 1, max_chunks);
}

EF_DEFINE_LAUNCHES(float)
}  // namespace ef::depthwise_conv
