"""A batch that stays at its place in memory, so that a CUDA graph can read the next one there."""

from __future__ import annotations

import torch
from torch import Tensor

from effdet_fast.data.batch import object_rows


class StaticBatch:
    """Room for batches of one image shape and at most so many objects per image.

    Args:
        images: [B, ...]; its shape, dtype, device and layout are taken over.
        gt_boxes: [B, M, 4]; its dtype is taken over.
        gt_labels: int64 [B, M].
        rows: Objects per image there must be room for; `object_rows` of M if that is more.
    """

    def __init__(self, images: Tensor, gt_boxes: Tensor, gt_labels: Tensor, rows: int = 0) -> None:
        rows = max(rows, object_rows(gt_labels.shape[1]))
        self.images = torch.empty_like(images)
        self.gt_boxes = gt_boxes.new_zeros(len(images), rows, 4)
        self.gt_labels = gt_labels.new_full((len(images), rows), -1)
        self.fill(images, gt_boxes, gt_labels)

    def mismatch(self, images: Tensor, gt_boxes: Tensor) -> str | None:
        """What keeps a batch from being read here, in words."""
        for what, given, held in (("images", images, self.images), ("gt_boxes", gt_boxes, self.gt_boxes)):
            if given.dtype != held.dtype:
                return f"{what} are {given.dtype}, where the graph has {held.dtype}"
        if images.shape != self.images.shape:
            return f"images have shape {list(images.shape)}, where the graph has {list(self.images.shape)}"
        return None

    def fill(self, images: Tensor, gt_boxes: Tensor, gt_labels: Tensor) -> None:
        """Copy a batch in; rows past its objects become padding. Launches on the device only."""
        objects = gt_labels.shape[1]
        self.images.copy_(images)
        self.gt_boxes[:, :objects].copy_(gt_boxes)
        self.gt_boxes[:, objects:].zero_()
        self.gt_labels[:, :objects].copy_(gt_labels)
        self.gt_labels[:, objects:].fill_(-1)


def check_shapes(caller: str, images: Tensor, gt_boxes: Tensor, gt_labels: Tensor) -> None:
    """Raise ValueError unless these are images with their padded objects: a copy would broadcast."""
    if gt_labels.dim() != 2 or len(gt_labels) != len(images):
        raise ValueError(f"{caller}: gt_labels must have shape [{len(images)}, M], got {list(gt_labels.shape)}")
    if list(gt_boxes.shape) != [*gt_labels.shape, 4]:
        raise ValueError(f"{caller}: gt_boxes must have shape {[*gt_labels.shape, 4]}, got {list(gt_boxes.shape)}")
