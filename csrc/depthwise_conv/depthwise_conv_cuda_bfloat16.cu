#include "depthwise_conv_launch.cuh"

namespace ef::depthwise_conv {
EF_DEFINE_LAUNCHES(c10::BFloat16)
}  // namespace ef::depthwise_conv
