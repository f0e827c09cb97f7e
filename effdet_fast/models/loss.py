"""EfficientDet's training loss: the op, with the constants of a configuration."""

from __future__ import annotations

import torch

from effdet_fast.models.config import EfficientDetConfig
from effdet_fast.ops import AnchorTargets, DetectionLoss
from effdet_fast.ops import detection_loss as detection_loss_of

__all__ = ["DetectionLoss", "detection_loss"]


def detection_loss(
    cls_outputs: list[torch.Tensor],
    box_outputs: list[torch.Tensor],
    targets: AnchorTargets,
    config: EfficientDetConfig,
) -> DetectionLoss:
    """Focal loss over all anchors and classes, and Huber loss of the matched anchors' codes.

    Both are sums divided by the batch's number of matched anchors + 1; the box loss also by 4. A code target that is
    exactly 0 does not count, as in the models this one is weight-compatible with.

    Args:
        cls_outputs: Per level [B, A * num_classes, H, W] logits.
        box_outputs: Per level [B, A * 4, H, W] codes.
        targets: Labels of the same anchors, levels concatenated.
        config: Loss constants.
    """
    return detection_loss_of(
        cls_outputs,
        box_outputs,
        targets.labels,
        targets.boxes,
        targets.num_positives,
        num_classes=config.num_classes,
        alpha=config.focal_alpha,
        gamma=config.focal_gamma,
        delta=config.huber_delta,
        box_loss_weight=config.box_loss_weight,
        label_smoothing=config.label_smoothing,
    )
