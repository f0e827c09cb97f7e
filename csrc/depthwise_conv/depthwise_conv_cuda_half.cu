#include "depthwise_conv_launch.cuh"

namespace ef::depthwise_conv {
EF_DEFINE_LAUNCHES(c10::Half)
}  // namespace ef::depthwise_conv
