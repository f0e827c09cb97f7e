"""From head outputs to detections, for a whole batch at once and without a host sync."""

from __future__ import annotations

import torch

from effdet_fast.models.config import EfficientDetConfig
from effdet_fast.ops import Detections, decode_detections


def postprocess(
    cls_outputs: list[torch.Tensor],
    box_outputs: list[torch.Tensor],
    anchors: torch.Tensor,
    config: EfficientDetConfig,
    *,
    score_threshold: float | None = None,
    iou_threshold: float = 0.5,
    max_detections: int = 100,
    clip_sizes: torch.Tensor | None = None,
) -> Detections:
    """The best `config.max_candidates` scores over all levels and classes, decoded, through per-class NMS.

    Args:
        cls_outputs: Per level [B, A * num_classes, H, W] logits.
        box_outputs: Per level [B, A * 4, H, W] codes.
        anchors: float32 [N, 4] xyxy.
        config: Number of classes, anchors per cell and candidates.
        score_threshold: Candidates with a lower score are dropped; None keeps all.
        iou_threshold: NMS suppresses above this IoU.
        max_detections: Rows of the result.
        clip_sizes: float [B, 2] (height, width) in input pixels to clip each image's boxes to, before NMS; None does
            not clip.
    """
    return decode_detections(
        cls_outputs,
        box_outputs,
        anchors,
        num_classes=config.num_classes,
        max_candidates=config.max_candidates,
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
        max_detections=max_detections,
        clip_sizes=clip_sizes,
    )
