"""What the ops on sets of boxes share: their result, the overlap of boxes, and the checks of their arguments."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from effdet_fast.ops._arguments import autocast_dtype, check_floating, check_same_device, check_tensor, dtype_name

MOST_DETECTIONS = 1 << 30  # as in csrc/nms/nms.cpp and csrc/soft_nms/soft_nms.cpp
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Detections(NamedTuple):
    """Detections of a batch of B images, K slots each; an image's rows beyond its count hold zeros and -1.

    Attributes:
        boxes: ``[B, K, 4]``, dtype of the input boxes; (x1, y1, x2, y2); 0 beyond the count.
        scores: ``[B, K]``, dtype of the input scores; descending; 0 beyond the count.
        labels: ``[B, K]`` int64; -1 beyond the count.
        indices: ``[B, K]`` int64, which of the image's N input boxes a row is; -1 beyond the count.
        counts: ``[B]`` int64, how many rows of each image are detections.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    indices: Tensor
    counts: Tensor


def iou_with(box: Tensor, others: Tensor) -> Tensor:
    """IoU of a box ``[..., 1, 4]`` with others ``[..., N, 4]``; NaN where it has none."""
    x1, y1 = torch.maximum(box[..., 0], others[..., 0]), torch.maximum(box[..., 1], others[..., 1])
    x2, y2 = torch.minimum(box[..., 2], others[..., 2]), torch.minimum(box[..., 3], others[..., 3])
    width, height = x2 - x1, y2 - y1
    intersection = torch.where(width > 0, width, 0) * torch.where(height > 0, height, 0)
    area, areas = ((b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1]) for b in (box, others))
    return intersection / (area + areas - intersection)


def in_arithmetic_dtype(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def detections_of(boxes: Tensor, scores: Tensor, labels: Tensor, picks: Tensor) -> Detections:
    """The detections at the indices ``picks [B, K]``, -1 past the last one; ``scores [B, K]`` are those of the picks."""
    kept = picks >= 0
    rows = picks.clamp(min=0)
    if boxes.shape[1] == 0:
        boxes, labels = boxes.new_zeros(len(boxes), 1, 4), labels.new_zeros(len(boxes), 1)
    return Detections(
        torch.where(kept.unsqueeze(-1), boxes.gather(1, rows.unsqueeze(-1).expand(-1, -1, 4)), 0),
        torch.where(kept, scores, 0),
        torch.where(kept, labels.gather(1, rows), -1),
        picks,
        kept.sum(1),
    )


def check_boxes(op: str, boxes: Tensor, scores: Tensor, *, batched: bool) -> tuple[Tensor, Tensor]:
    check_floating(op, "boxes", boxes)
    check_floating(op, "scores", scores)
    if boxes.dim() != 2 + batched or boxes.shape[-1] != 4:
        raise ValueError(f"{op}: boxes must have shape {'[B, N, 4]' if batched else '[N, 4]'}, got {list(boxes.shape)}")
    if scores.shape != boxes.shape[:-1]:
        raise ValueError(f"{op}: scores must have shape {list(boxes.shape[:-1])}, got {list(scores.shape)}")
    check_same_device(op, "scores", scores, "boxes", boxes)
    if scores.dtype != boxes.dtype:
        if autocast_dtype(boxes) is None:
            expected, got = dtype_name(boxes.dtype), dtype_name(scores.dtype)
            raise TypeError(f"{op}: scores must have the dtype of boxes, {expected}, got {got}")
        wider = torch.promote_types(boxes.dtype, scores.dtype)
        boxes, scores = boxes.to(wider), scores.to(wider)
    return boxes.detach(), scores.detach()


def check_classes(op: str, name: str, classes: Tensor, scores: Tensor) -> Tensor:
    check_tensor(op, name, classes)
    if classes.dtype not in _INTEGERS:
        raise TypeError(f"{op}: {name} must be an integer tensor, got {dtype_name(classes.dtype)}")
    if classes.shape != scores.shape:
        raise ValueError(f"{op}: {name} must have shape {list(scores.shape)}, got {list(classes.shape)}")
    if classes.device.type != "cpu":
        check_same_device(op, name, classes, "boxes", scores)
    return classes.to(device=scores.device, dtype=torch.int64)


def check_number(op: str, name: str, threshold: Any) -> None:
    if not isinstance(threshold, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {type(threshold).__name__}")
    if threshold != threshold:
        raise ValueError(f"{op}: {name} must be a number, got nan")


def check_most_detections(op: str, max_detections: Any) -> None:
    if not isinstance(max_detections, int):
        raise TypeError(f"{op}: max_detections must be an int, got {type(max_detections).__name__}")
    if not 1 <= max_detections <= MOST_DETECTIONS:
        raise ValueError(f"{op}: max_detections must be in [1, {MOST_DETECTIONS}], got {max_detections}")
