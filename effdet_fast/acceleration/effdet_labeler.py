"""effdet's anchor labeler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effdet_fast.acceleration.swap import Swap, is_one_of
from effdet_fast.ops import match_anchors


def swap_axes(boxes: Tensor) -> Tensor:
    """Boxes [..., 4] (y1, x1, y2, x2), as effdet has them, to (x1, y1, x2, y2)."""
    return boxes.unflatten(-1, (2, 2)).flip(-1).flatten(-2)


class AnchorLabeler(Swap):
    """`AnchorLabeler.batch_label_anchors`: all images at once, without a matrix of all overlaps and without waiting for a GPU."""

    classes = ("effdet.AnchorLabeler",)
    family, replacement = "anchor_matching", "match_anchors"
    anchors: Any
    target_assigner: Any

    @classmethod
    def reason_against(cls, obj: Any) -> str | None:
        assigner = obj.target_assigner
        matcher, coder = assigner._matcher, assigner._box_coder
        if not is_one_of(matcher, "effdet.ArgMaxMatcher") or not is_one_of(coder, "effdet.FasterRcnnBoxCoder"):
            return "its matcher or box coder was replaced"
        if not 0 < matcher._unmatched_threshold <= matcher._matched_threshold:
            return f"match threshold {matcher._unmatched_threshold}"
        if not matcher._negatives_lower_than_unmatched:
            return "it ignores the lowest overlaps"
        if coder._scale_factors is not None:
            return "scaled box deltas"
        return None

    def batch_label_anchors(
        self, gt_boxes: Tensor | Sequence[Tensor], gt_classes: Tensor | Sequence[Tensor], filter_valid: bool = True
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        if not filter_valid or AnchorLabeler.reason_against(self):
            return super().batch_label_anchors(gt_boxes, gt_classes, filter_valid)  # type: ignore[misc]
        anchors, matcher = self.anchors, self.target_assigner._matcher
        # Classes count from 1. One of 0 is an object too, though its anchors are told to be background.
        targets = match_anchors(
            swap_axes(anchors.boxes),
            swap_axes(padded(gt_boxes)),
            padded(gt_classes).long(),
            pos_iou=matcher._matched_threshold,
            neg_iou=matcher._unmatched_threshold,
            force_match=matcher._force_match_for_each_row,
            allow_low_quality_matches=False,
            box_coder="effdet",
            any_box=True,
        )
        labels = targets.labels.clamp(min=0) - 1
        sizes = [anchors.feat_sizes[level] for level in range(anchors.min_level, anchors.max_level + 1)]
        counts = [height * width * anchors.get_anchors_per_location() for height, width in sizes]
        return (
            [x.unflatten(1, (*size, -1)) for x, size in zip(labels.split(counts, 1), sizes, strict=True)],
            [
                x.flatten(1).unflatten(1, (*size, -1))
                for x, size in zip(targets.boxes.split(counts, 1), sizes, strict=True)
            ],
            targets.num_positives,
        )


def padded(images: Tensor | Sequence[Tensor]) -> Tensor:
    """The rows of all images in one tensor, rows of -1 after those of images that have fewer."""
    if isinstance(images, Tensor):
        return images
    max_rows = max(len(rows) for rows in images)
    return torch.stack(
        [F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, max_rows - len(rows)), value=-1) for rows in images]
    )
