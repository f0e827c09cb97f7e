"""EfficientDet's training loss, read off the head outputs where they are."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from effdet_fast.models.config import EfficientDetConfig
from effdet_fast.ops import AnchorTargets, sigmoid_focal_loss


class DetectionLoss(NamedTuple):
    """Scalars, float32: `total` = `cls` + box_loss_weight * `box`."""

    total: torch.Tensor
    cls: torch.Tensor
    box: torch.Tensor


def per_anchor_view(output: torch.Tensor, anchors_per_cell: int) -> torch.Tensor:
    """A head output [B, A * K, H, W] seen as [B, H, W, A, K]; never copies, dense if the output is channels_last."""
    return output.unflatten(1, (anchors_per_cell, -1)).permute(0, 3, 4, 1, 2)


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
    normalizer = targets.num_positives.sum() + 1.0
    counts = [output.shape[2] * output.shape[3] * config.anchors_per_cell for output in cls_outputs]
    labels = targets.labels.split(counts, dim=1)
    codes = targets.boxes.split(counts, dim=1)

    cls_losses, box_losses = [], []
    for level, (cls_output, box_output) in enumerate(zip(cls_outputs, box_outputs, strict=True)):
        logits = per_anchor_view(cls_output, config.anchors_per_cell)
        cls_losses.append(
            sigmoid_focal_loss(
                logits,
                labels[level].view(logits.shape[:-1]),
                alpha=config.focal_alpha,
                gamma=config.focal_gamma,
                reduction="sum",
                label_smoothing=config.label_smoothing,
                normalizer=normalizer,
            )
        )
        predicted = per_anchor_view(box_output, config.anchors_per_cell).float()
        target = codes[level].view(predicted.shape)
        masked = torch.where(target != 0.0, predicted, 0.0)
        box_losses.append(F.huber_loss(masked, target, reduction="sum", delta=config.huber_delta))
    cls_loss = torch.stack(cls_losses).sum()
    box_loss = torch.stack(box_losses).sum() / (4.0 * normalizer)
    return DetectionLoss(cls_loss + config.box_loss_weight * box_loss, cls_loss, box_loss)
