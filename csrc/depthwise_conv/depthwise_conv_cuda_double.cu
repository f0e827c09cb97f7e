#include "depthwise_conv_launch.cuh"

namespace ef::depthwise_conv {
EF_DEFINE_LAUNCHES(double)
}  // namespace ef::depthwise_conv
