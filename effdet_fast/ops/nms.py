"""Non-maximum suppression: of one set of boxes, per class, and of a whole batch with fixed output shapes."""

from typing import NamedTuple

import torch
from torch import Tensor

from effdet_fast.ops import _library
from effdet_fast.ops._arguments import (
    autocast_dtype,
    check_choice,
    check_floating,
    check_same_device,
    check_tensor,
    dtype_name,
)

_METHODS = ("hard",)
_MOST_DETECTIONS = 1 << 30  # as in csrc/nms/nms.cpp
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


def _overlaps(box: Tensor, others: Tensor, iou_threshold: float) -> Tensor:
    """Whether the IoU of a box ``[..., 1, 4]`` with others ``[..., N, 4]`` exceeds the threshold; False where it is NaN."""
    x1, y1 = torch.maximum(box[..., 0], others[..., 0]), torch.maximum(box[..., 1], others[..., 1])
    x2, y2 = torch.minimum(box[..., 2], others[..., 2]), torch.minimum(box[..., 3], others[..., 3])
    width, height = x2 - x1, y2 - y1
    intersection = torch.where(width > 0, width, 0) * torch.where(height > 0, height, 0)
    area, areas = ((b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1]) for b in (box, others))
    return (intersection / (area + areas - intersection)).double() > iou_threshold


def _in_arithmetic_dtype(boxes: Tensor) -> Tensor:
    return boxes if boxes.dtype == torch.float64 else boxes.float()


def nms_reference(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """:func:`nms` in plain PyTorch, one box after the other."""
    return batched_nms_reference(boxes, scores, torch.zeros_like(scores, dtype=torch.int64), iou_threshold)


def batched_nms_reference(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """:func:`batched_nms` in plain PyTorch, one box after the other."""
    order = scores.argsort(descending=True, stable=True)
    ranked, classes = _in_arithmetic_dtype(boxes.detach())[order], idxs.to(boxes.device)[order]
    keep = torch.ones_like(classes, dtype=torch.bool)
    for i in range(len(order)):
        if keep[i]:
            suppressed = _overlaps(ranked[i, None], ranked[i + 1 :], iou_threshold) & (classes[i + 1 :] == classes[i])
            keep[i + 1 :] &= ~suppressed
    return order[keep]


def batched_nms_padded_reference(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    iou_threshold: float,
    *,
    max_detections: int = 100,
    score_threshold: float | None = None,
    method: str = "hard",
) -> Detections:
    """:func:`batched_nms_padded` in plain PyTorch: the best box left of every image at once, ``max_detections`` times."""
    check_choice("batched_nms_padded_reference", "method", method, _METHODS)
    boxes, scores, labels = boxes.detach(), scores.detach(), labels.to(boxes.device).long()
    batch, n = scores.shape
    ranked_scores, order = scores.sort(dim=1, descending=True, stable=True)
    ranked = _in_arithmetic_dtype(boxes).gather(1, order.unsqueeze(-1).expand(-1, -1, 4))
    classes = labels.gather(1, order)
    alive = torch.ones_like(order, dtype=torch.bool)
    if score_threshold is not None:
        alive = ranked_scores.double() > score_threshold
    picks = order.new_full((batch, max_detections), -1)
    for k in range(min(max_detections, n)):
        best = alive.long().argmax(1, keepdim=True)  # the first that is alive, where there is one
        found = alive.gather(1, best)
        picks[:, k] = torch.where(found, order.gather(1, best), -1).squeeze(1)
        box = ranked.gather(1, best.unsqueeze(-1).expand(-1, -1, 4))
        suppressed = _overlaps(box, ranked, iou_threshold) & (classes == classes.gather(1, best))
        alive = (alive & ~suppressed).scatter(1, best, False)
    kept = picks >= 0
    if n == 0:
        no_labels = torch.full_like(picks, -1)
        nothing = boxes.new_zeros(batch, max_detections, 4), scores.new_zeros(batch, max_detections)
        return Detections(*nothing, no_labels, picks, kept.sum(1))
    rows = picks.clamp(min=0)
    return Detections(
        torch.where(kept.unsqueeze(-1), boxes.gather(1, rows.unsqueeze(-1).expand(-1, -1, 4)), 0),
        torch.where(kept, scores.gather(1, rows), 0),
        torch.where(kept, labels.gather(1, rows), -1),
        picks,
        kept.sum(1),
    )


_nms = _library.define(
    "nms(Tensor boxes, Tensor? labels, float iou_threshold) -> Tensor",
    lambda boxes, labels, iou_threshold: boxes.new_empty(boxes.shape[0], dtype=torch.bool),
)
_nms_padded = _library.define(
    "nms_padded(Tensor boxes, Tensor ranked_scores, Tensor order, Tensor labels, float iou_threshold, float? score_threshold, "
    "int max_detections) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda boxes, ranked_scores, order, labels, iou_threshold, score_threshold, max_detections: (
        boxes.new_empty(boxes.shape[0], max_detections, 4),
        boxes.new_empty(boxes.shape[0], max_detections),
        labels.new_empty(boxes.shape[0], max_detections),
        labels.new_empty(boxes.shape[0], max_detections),
        labels.new_empty(boxes.shape[0]),
    ),
)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Keeps the boxes that no kept box of a higher score overlaps with an IoU above the threshold.

    The result is that of ``torchvision.ops.nms`` on the CPU for every input, bit by bit in the IoU: float32 arithmetic (float64
    for float64 boxes; float16 and bfloat16 are computed in float32) compared with ``iou_threshold`` as a float64. A box with NaN
    in it, or a pair without area, has no IoU and suppresses nothing. Of equal scores the lower index comes first; NaN scores
    come before all others.

    Args:
        boxes: ``[N, 4]``, (x1, y1, x2, y2); float16, bfloat16, float32 or float64; any strides.
        scores: ``[N]``, dtype of ``boxes``.
        iou_threshold: any number but NaN; a box goes if its IoU is greater.

    Returns:
        Indices of the kept boxes, int64, by descending score. Their number depends on the values, so on a GPU the call waits for
        the device once; :func:`batched_nms_padded` never does. Deterministic. No gradient.

    Raises:
        TypeError: a dtype is not supported, or ``scores`` has another than ``boxes`` outside autocast.
        ValueError: shapes or devices do not fit, or the threshold is NaN.
    """
    boxes, scores = _check_boxes("nms", boxes, scores, batched=False)
    _check_threshold("nms", "iou_threshold", iou_threshold)
    if not _library.is_native(boxes):
        return nms_reference(boxes, scores, iou_threshold)
    order = scores.argsort(descending=True, stable=True)
    return order[_nms(boxes[order].contiguous(), None, float(iou_threshold))]


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """:func:`nms` among the boxes of each class; the result of torchvision's loop over the classes, for every input.

    Classes are compared by id, so coordinates may be negative and ids of any size.

    Args:
        boxes: ``[N, 4]``, as in :func:`nms`.
        scores: ``[N]``, dtype of ``boxes``.
        idxs: ``[N]``, class of each box; any integer dtype; on the device of ``boxes`` or on the CPU.
        iou_threshold: as in :func:`nms`.

    Returns:
        Indices of the kept boxes of all classes, int64, by descending score; see :func:`nms`.

    Raises:
        TypeError: a dtype is not supported, or ``scores`` has another than ``boxes`` outside autocast.
        ValueError: shapes or devices do not fit, or the threshold is NaN.
    """
    boxes, scores = _check_boxes("batched_nms", boxes, scores, batched=False)
    idxs = _check_classes("batched_nms", "idxs", idxs, scores)
    _check_threshold("batched_nms", "iou_threshold", iou_threshold)
    if not _library.is_native(boxes):
        return batched_nms_reference(boxes, scores, idxs, iou_threshold)
    ranking = scores.argsort(descending=True, stable=True)
    classes, by_class = idxs[ranking].sort(stable=True)  # the kernel wants each class in one piece
    keep = _nms(boxes[ranking[by_class]].contiguous(), classes, float(iou_threshold))
    return ranking[torch.empty_like(keep).scatter_(0, by_class, keep)]


def batched_nms_padded(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    iou_threshold: float,
    *,
    max_detections: int = 100,
    score_threshold: float | None = None,
    method: str = "hard",
) -> Detections:
    """:func:`batched_nms` of every image of a batch at once, cut to the best ``max_detections``; output shapes are fixed.

    Never waits for the device and can be captured in a CUDA graph (with the labels on the device: copying them there waits). An
    image equals ``batched_nms`` of its boxes above the score threshold, truncated. Work stops at ``max_detections``.

    Args:
        boxes: ``[B, N, 4]``, (x1, y1, x2, y2); float16, bfloat16, float32 or float64; any strides.
        scores: ``[B, N]``, dtype of ``boxes``.
        labels: ``[B, N]``, class of each box; any integer dtype; on the device of ``boxes`` or on the CPU.
        iou_threshold: as in :func:`nms`.
        max_detections: K, >= 1.
        score_threshold: boxes with ``score > score_threshold`` take part, all without one. A NaN score is not greater than
            anything, so a threshold drops it; without one it comes first, as in :func:`nms`.
        method: "hard".

    Returns:
        :class:`Detections` with K rows per image, by descending score. Deterministic. No gradient.

    Raises:
        TypeError: a dtype is not supported, or ``scores`` has another than ``boxes`` outside autocast; a number is not one.
        ValueError: shapes or devices do not fit, a threshold is NaN, ``max_detections`` < 1, or ``method`` is unknown.
    """
    op = "batched_nms_padded"
    boxes, scores = _check_boxes(op, boxes, scores, batched=True)
    labels = _check_classes(op, "labels", labels, scores)
    _check_threshold(op, "iou_threshold", iou_threshold)
    if score_threshold is not None:
        _check_threshold(op, "score_threshold", score_threshold)
    if not isinstance(max_detections, int):
        raise TypeError(f"{op}: max_detections must be an int, got {type(max_detections).__name__}")
    if not 1 <= max_detections <= _MOST_DETECTIONS:
        raise ValueError(f"{op}: max_detections must be in [1, {_MOST_DETECTIONS}], got {max_detections}")
    check_choice(op, "method", method, _METHODS)
    if not _library.is_native(boxes):
        return batched_nms_padded_reference(
            boxes, scores, labels, iou_threshold, max_detections=max_detections, score_threshold=score_threshold
        )
    ranked, order = scores.contiguous().sort(dim=1, descending=True, stable=True)
    threshold = None if score_threshold is None else float(score_threshold)
    detections = _nms_padded(
        boxes.contiguous(), ranked, order, labels.contiguous(), float(iou_threshold), threshold, max_detections
    )
    return Detections(*detections)


def _check_boxes(op: str, boxes: Tensor, scores: Tensor, *, batched: bool) -> tuple[Tensor, Tensor]:
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


def _check_classes(op: str, name: str, classes: Tensor, scores: Tensor) -> Tensor:
    check_tensor(op, name, classes)
    if classes.dtype not in _INTEGERS:
        raise TypeError(f"{op}: {name} must be an integer tensor, got {dtype_name(classes.dtype)}")
    if classes.shape != scores.shape:
        raise ValueError(f"{op}: {name} must have shape {list(scores.shape)}, got {list(classes.shape)}")
    if classes.device.type != "cpu":
        check_same_device(op, name, classes, "boxes", scores)
    return classes.to(device=scores.device, dtype=torch.int64)


def _check_threshold(op: str, name: str, threshold: float) -> None:
    if not isinstance(threshold, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {type(threshold).__name__}")
    if threshold != threshold:
        raise ValueError(f"{op}: {name} must be a number, got nan")
