// The Tensor boundaries of all ops in one translation unit, compiled once for each library: reading PyTorch's headers takes longer than
// compiling any of them.
#include "anchor_matching/anchor_matching.cpp"
#include "batch_norm_act/batch_norm_act.cpp"
#include "decode_detections/decode_detections.cpp"
#include "depthwise_conv/depthwise_conv.cpp"
#include "detection_loss/detection_loss.cpp"
#include "focal_loss/focal_loss.cpp"
#include "fusion/fusion.cpp"
#include "nms/nms.cpp"
#include "soft_nms/soft_nms.cpp"
#include "squeeze_excite/squeeze_excite.cpp"
