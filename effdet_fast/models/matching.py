"""Which anchor answers for which object: EfficientDet's label assignment on the device, without a host sync."""

from __future__ import annotations

from typing import NamedTuple

import torch

from effdet_fast.models.box_coder import encode_boxes

# Elements of the IoU matrix handled at once on a CPU.
CPU_PIECE = 1 << 17
# Two empty boxes have no IoU; a union no smaller than this makes it 0.
SMALLEST_AREA = 1e-30


class AnchorTargets(NamedTuple):
    """What the heads should say at each anchor.

    Attributes:
        labels: int64 [B, N], class of the matched object, -1 for background.
        boxes: float32 [B, N, 4], code (ty, tx, th, tw) of the matched object, 0 for background.
        num_positives: float32 [B], matched anchors of each image.
    """

    labels: torch.Tensor
    boxes: torch.Tensor
    num_positives: torch.Tensor


@torch.no_grad()
def match_anchors(
    anchors: torch.Tensor, gt_boxes: torch.Tensor, gt_labels: torch.Tensor, iou_threshold: float = 0.5
) -> AnchorTargets:
    """Assigns each anchor the object it overlaps most, if the IoU reaches the threshold.

    On top of that every object takes its best anchor, whatever the IoU; where several objects want the same anchor the
    first one gets it, and of equally good anchors the first is taken. There is no band of ignored anchors, and no
    choice left open.

    Args:
        anchors: float32 [N, 4] xyxy.
        gt_boxes: float [B, M, 4] xyxy in the anchors' units; M = 0 is an empty batch of objects.
        gt_labels: int64 [B, M] classes, negative for a padding row, which matches nothing.
        iou_threshold: Smallest IoU of a match that is not forced, > 0.
    """
    batch, max_objects = gt_labels.shape
    if max_objects == 0:
        labels = gt_labels.new_full((batch, len(anchors)), -1)
        return AnchorTargets(labels, anchors.new_zeros((batch, *anchors.shape)), anchors.new_zeros(batch))
    # An empty box overlaps nothing, whatever a padding row held.
    gt_boxes = torch.where((gt_labels >= 0).unsqueeze(2), gt_boxes.to(torch.float32), 0.0)
    # Image by image: the IoU matrix of a whole batch would be the largest tensor of a training step.
    matches = torch.stack(
        [_match_image(anchors, boxes, labels, iou_threshold) for boxes, labels in zip(gt_boxes, gt_labels, strict=True)]
    )
    positive = matches >= 0
    index = matches.clamp(min=0)
    labels = torch.where(positive, gt_labels.gather(1, index), -1)
    matched = gt_boxes.gather(1, index.unsqueeze(2).expand(-1, -1, 4))
    boxes = torch.where(positive.unsqueeze(2), encode_boxes(matched, anchors), 0.0)
    return AnchorTargets(labels, boxes, positive.sum(dim=1, dtype=torch.float32))


def pairwise_iou(boxes: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """IoU [M, N] of boxes [M, 4] and anchors [N, 4], xyxy; 0 where they do not overlap, also for empty boxes."""
    x0, y0, x1, y1 = boxes.unsqueeze(1).unbind(-1)
    # One dense row per coordinate, as the loops below run along the anchors.
    anchor_x0, anchor_y0, anchor_x1, anchor_y1 = anchors.t().contiguous().unbind(0)
    overlap = torch.minimum(y1, anchor_y1).sub_(torch.maximum(y0, anchor_y0)).clamp_(min=0.0)
    overlap.mul_(torch.minimum(x1, anchor_x1).sub_(torch.maximum(x0, anchor_x0)).clamp_(min=0.0))
    areas = ((y1 - y0) * (x1 - x0)) + ((anchor_y1 - anchor_y0) * (anchor_x1 - anchor_x0))
    return overlap.div_(areas.sub_(overlap).clamp_(min=SMALLEST_AREA))


def _match_image(
    anchors: torch.Tensor, boxes: torch.Tensor, labels: torch.Tensor, iou_threshold: float
) -> torch.Tensor:
    """Index of the object each anchor answers for, int64 [N], -1 for none."""
    num_objects = len(boxes)
    # On a CPU the IoU matrix is made in pieces that stay in cache; elsewhere every piece would cost its launches.
    piece = max(1, CPU_PIECE // num_objects) if anchors.device.type == "cpu" else len(anchors)
    over_objects, over_anchors = [], []
    for some_anchors in anchors.split(piece):
        iou = pairwise_iou(boxes, some_anchors)
        over_objects.append(iou.max(dim=0))
        over_anchors.append(iou.max(dim=1))
    best_iou = torch.cat([best.values for best in over_objects])
    matches = torch.where(best_iou >= iou_threshold, torch.cat([best.indices for best in over_objects]), -1)

    # Of equal maxima `max` gives the first, so this is the first best anchor over all pieces.
    best_piece = torch.stack([best.values for best in over_anchors]).argmax(dim=0, keepdim=True)
    in_piece = torch.stack([best.indices for best in over_anchors]).gather(0, best_piece)
    best_anchor = (best_piece * piece + in_piece).squeeze(0)
    # The smallest index claiming an anchor gets it. Padding rows claim with an index nobody wants.
    claims = torch.where(labels >= 0, torch.arange(num_objects, device=boxes.device), num_objects)
    forced = torch.full_like(matches, num_objects).scatter_reduce_(0, best_anchor, claims, "amin")
    return torch.where(forced < num_objects, forced, matches)
