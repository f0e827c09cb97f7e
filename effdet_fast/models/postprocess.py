"""From head outputs to detections, for a whole batch at once and without a host sync."""

from __future__ import annotations

import torch

from effdet_fast.models.box_coder import decode_boxes
from effdet_fast.models.config import EfficientDetConfig
from effdet_fast.models.loss import per_anchor_view
from effdet_fast.ops import Detections, batched_nms_padded


@torch.no_grad()
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
    batch = cls_outputs[0].shape[0]
    per_cell = config.anchors_per_cell
    logits = torch.cat([per_anchor_view(output, per_cell).reshape(batch, -1) for output in cls_outputs], dim=1)
    codes = torch.cat([per_anchor_view(output, per_cell).reshape(batch, -1, 4) for output in box_outputs], dim=1)

    candidates = min(config.max_candidates, logits.shape[1])
    top_logits, top = torch.topk(logits, candidates, dim=1)
    anchor_index = torch.div(top, config.num_classes, rounding_mode="floor")
    labels = top - anchor_index * config.num_classes
    top_codes = codes.gather(1, anchor_index.unsqueeze(2).expand(-1, -1, 4))
    boxes = decode_boxes(top_codes.float(), anchors[anchor_index])
    if clip_sizes is not None:
        limits = clip_sizes.to(boxes).flip(1).repeat(1, 2).unsqueeze(1)
        boxes = torch.minimum(boxes.clamp_(min=0.0), limits)
    return batched_nms_padded(
        boxes,
        top_logits.float().sigmoid(),
        labels,
        iou_threshold,
        max_detections=max_detections,
        score_threshold=score_threshold,
    )
