"""The operators as functions: ``effdet_fast.ops.<function>``, each with a ``<function>_reference`` beside it."""

from effdet_fast.ops._arguments import set_debug
from effdet_fast.ops._boxes import Detections
from effdet_fast.ops._flops import register_on_import as _count_flops_with_pytorch
from effdet_fast.ops._library import use_reference
from effdet_fast.ops.anchor_matching import AnchorTargets, match_anchors, match_anchors_reference
from effdet_fast.ops.batch_norm_act import batch_norm_act, batch_norm_act_reference
from effdet_fast.ops.decode_detections import decode_detections, decode_detections_reference
from effdet_fast.ops.depthwise_conv import (
    depthwise_conv2d,
    depthwise_conv2d_reference,
    depthwise_separable_conv2d,
    depthwise_separable_conv2d_reference,
)
from effdet_fast.ops.depthwise_conv_levels import depthwise_conv2d_levels, depthwise_conv2d_levels_reference
from effdet_fast.ops.detection_loss import DetectionLoss, detection_loss, detection_loss_reference
from effdet_fast.ops.focal_loss import sigmoid_focal_loss, sigmoid_focal_loss_reference
from effdet_fast.ops.fusion import (
    fast_normalized_fusion,
    fast_normalized_fusion_reference,
    weighted_fusion,
    weighted_fusion_reference,
)
from effdet_fast.ops.nms import (
    batched_nms,
    batched_nms_padded,
    batched_nms_padded_reference,
    batched_nms_reference,
    nms,
    nms_reference,
)
from effdet_fast.ops.soft_nms import soft_nms, soft_nms_reference
from effdet_fast.ops.squeeze_excite import squeeze_excite, squeeze_excite_reference

__all__ = [
    "AnchorTargets",
    "DetectionLoss",
    "Detections",
    "batch_norm_act",
    "batch_norm_act_reference",
    "batched_nms",
    "batched_nms_padded",
    "batched_nms_padded_reference",
    "batched_nms_reference",
    "decode_detections",
    "decode_detections_reference",
    "depthwise_conv2d",
    "depthwise_conv2d_levels",
    "depthwise_conv2d_levels_reference",
    "depthwise_conv2d_reference",
    "depthwise_separable_conv2d",
    "depthwise_separable_conv2d_reference",
    "match_anchors",
    "match_anchors_reference",
    "detection_loss",
    "detection_loss_reference",
    "nms",
    "nms_reference",
    "fast_normalized_fusion",
    "fast_normalized_fusion_reference",
    "set_debug",
    "sigmoid_focal_loss",
    "sigmoid_focal_loss_reference",
    "soft_nms",
    "soft_nms_reference",
    "squeeze_excite",
    "squeeze_excite_reference",
    "use_reference",
    "weighted_fusion",
    "weighted_fusion_reference",
]

_count_flops_with_pytorch()
