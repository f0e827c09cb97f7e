"""What the ops on boxes share: their result, overlap and deltas of boxes, and the checks of their arguments."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effdet_fast._choices import MAX_DETECTIONS
from effdet_fast.ops._arguments import (
    autocast_dtype,
    check_floating,
    check_integer,
    check_same_device,
    dtype_name,
    integer,
    number,
)
from effdet_fast.ops._layout import detached

_MAX_LOG_SCALE = math.log(1000 / 16)  # torchvision's
_EPS = 1e-7  # effdet's coder adds it to every side, so that an empty box has finite deltas


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


def is_empty(boxes: Tensor) -> Tensor:
    """Which boxes ``[..., 4]`` (xyxy) have no area; not one with NaN in it."""
    start, end = boxes.chunk(2, dim=-1)
    return (end <= start).any(-1)


def iou_with(box: Tensor, others: Tensor) -> Tensor:
    """IoU of a box ``[..., 1, 4]`` with others ``[..., N, 4]``; NaN where it has none."""
    x1, y1 = torch.maximum(box[..., 0], others[..., 0]), torch.maximum(box[..., 1], others[..., 1])
    x2, y2 = torch.minimum(box[..., 2], others[..., 2]), torch.minimum(box[..., 3], others[..., 3])
    width, height = x2 - x1, y2 - y1
    intersection = torch.where(width > 0, width, 0) * torch.where(height > 0, height, 0)
    area, areas = ((b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1]) for b in (box, others))
    return intersection / (area + areas - intersection)


def encode_boxes(boxes: Tensor, anchors: Tensor, box_coder: str | None = "effdet") -> Tensor:
    """Deltas ``[..., 4]`` of boxes (xyxy) relative to anchors (xyxy, broadcastable); ``match_anchors`` describes the coders."""
    if box_coder is None:
        return boxes
    start, end = boxes.unflatten(-1, (2, 2)).unbind(-2)
    anchor_start, anchor_end = anchors.unflatten(-1, (2, 2)).unbind(-2)
    size, anchor_size = end - start, anchor_end - anchor_start
    offset = (start + size / 2) - (anchor_start + anchor_size / 2)
    if box_coder == "effdet":
        size, anchor_size = size + _EPS, anchor_size + _EPS
    offset, scale = offset / anchor_size, torch.log(size / anchor_size)
    if box_coder == "effdet":
        offset, scale = offset.flip(-1), scale.flip(-1)
    return torch.cat([offset, scale], dim=-1)


def decode_boxes(deltas: Tensor, anchors: Tensor, box_coder: str = "effdet", limited: bool = True) -> Tensor:
    """Boxes ``[..., 4]`` (xyxy) from deltas relative to anchors (xyxy, broadcastable).

    torchvision limits how much larger than its anchor a box may be, effdet does not; nor does torchvision if not ``limited``.
    """
    x1, y1, x2, y2 = anchors.unbind(-1)
    dy, dx, log_height, log_width = deltas.unbind(-1)
    if box_coder == "torchvision":
        dx, dy, log_width, log_height = deltas.unbind(-1)
        if limited:
            log_width, log_height = log_width.clamp(max=_MAX_LOG_SCALE), log_height.clamp(max=_MAX_LOG_SCALE)
    width, height = x2 - x1, y2 - y1
    center_x, center_y = dx * width + (x1 + x2) / 2, dy * height + (y1 + y2) / 2
    half_width, half_height = log_width.exp() * width / 2, log_height.exp() * height / 2
    corners = (center_x - half_width, center_y - half_height, center_x + half_width, center_y + half_height)
    return torch.stack(corners, -1)


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


def padded_to(found: Detections, max_detections: int) -> Detections:
    """With rows of zeros and -1 added up to ``max_detections``."""
    if found.scores.shape[1] == max_detections:
        return found
    boxes, scores = with_rows(found.boxes, max_detections, 0), with_rows(found.scores, max_detections, 0)
    labels, indices = with_rows(found.labels, max_detections, -1), with_rows(found.indices, max_detections, -1)
    return Detections(boxes, scores, labels, indices, found.counts)


def with_rows(x: Tensor, rows: int, value: int) -> Tensor:
    """``[B, N, ...]`` made longer, to ``[B, rows, ...]``. `F.pad` takes no symbols where tensors are fake."""
    longer = x.new_full((x.shape[0], rows, *x.shape[2:]), value)
    longer[:, : x.shape[1]] = x
    return longer


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
    return detached(boxes), detached(scores)


def check_classes(op: str, name: str, classes: Tensor, scores: Tensor) -> Tensor:
    check_integer(op, name, classes)
    if classes.shape != scores.shape:
        raise ValueError(f"{op}: {name} must have shape {list(scores.shape)}, got {list(classes.shape)}")
    if not classes.is_cpu:
        check_same_device(op, name, classes, "boxes", scores)
    if classes.dtype == torch.int64 and classes.device == scores.device:
        return classes
    return classes.to(device=scores.device, dtype=torch.int64)


def check_threshold(op: str, name: str, threshold: Any) -> float:
    threshold = number(op, name, threshold)
    if threshold != threshold:
        raise ValueError(f"{op}: {name} must be a number, got nan")
    return threshold


def check_max_detections(op: str, max_detections: Any) -> int:
    count = integer(op, "max_detections", max_detections)
    if not 1 <= count <= MAX_DETECTIONS:
        raise ValueError(f"{op}: max_detections must be in [1, {MAX_DETECTIONS}], got {count}")
    return count
