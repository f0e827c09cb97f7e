"""Soft non-maximum suppression: overlapping boxes lose score instead of being dropped (Bodla et al., arXiv:1704.04503)."""

import torch
from torch import Tensor

from effdet_fast._choices import SOFT_NMS_METHODS
from effdet_fast.ops import _library
from effdet_fast.ops._arguments import arithmetic_dtype, check_choice
from effdet_fast.ops._boxes import (
    Detections,
    check_boxes,
    check_classes,
    check_max_detections,
    check_threshold,
    detections_of,
    iou_with,
    padded_to,
)

_NEVER = float("-inf")  # score of a box that is out: picked, or at or below the threshold


def soft_nms_reference(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor | None = None,
    *,
    method: str = "gaussian",
    sigma: float = 0.5,
    iou_threshold: float = 0.3,
    score_threshold: float = 0.001,
    max_detections: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Reference for `soft_nms`: one box after the other; in float64 where the boxes are."""
    check_choice("soft_nms_reference", "method", method, SOFT_NMS_METHODS)
    labels = torch.zeros_like(scores, dtype=torch.int64) if idxs is None else idxs.to(boxes.device).long()
    max_kept = max(1, len(scores)) if max_detections is None else max_detections
    found = soft_nms_padded_reference(
        boxes.detach()[None],
        scores.detach()[None],
        labels[None],
        method,
        sigma,
        iou_threshold,
        score_threshold,
        max_kept,
    )
    return _kept(found)


def soft_nms_padded_reference(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    method: str,
    sigma: float,
    iou_threshold: float,
    score_threshold: float | None,
    max_detections: int,
) -> Detections:
    """The best box left of every image at once, ``max_detections`` times; the others of its class decay."""
    batch, n = scores.shape
    lowest = _NEVER if score_threshold is None else score_threshold
    corners, current = boxes.to(arithmetic_dtype(boxes)), scores.to(arithmetic_dtype(scores))
    current = torch.where(current.double() > lowest, current, _NEVER)
    rows = min(max_detections, n)
    picks = labels.new_full((batch, rows), -1)
    decayed = scores.new_zeros(batch, rows)
    for k in range(rows):
        best = current.argmax(1, keepdim=True)  # the first of equal scores
        score = current.gather(1, best)
        picks[:, k] = torch.where(score > _NEVER, best, -1).squeeze(1)
        decayed[:, k] = score.squeeze(1).to(scores.dtype)
        iou = iou_with(corners.gather(1, best.unsqueeze(-1).expand(-1, -1, 4)), corners)
        if method == "gaussian":
            decay = torch.where(iou > 0, torch.exp(-iou * iou / sigma), 1)
        else:
            decay = torch.where(iou.double() > iou_threshold, 1 - iou, 1)
        current = torch.where(labels == labels.gather(1, best), current * decay, current).scatter(1, best, _NEVER)
        current = torch.where(current.double() > lowest, current, _NEVER)
    return padded_to(detections_of(boxes, decayed, labels, picks), max_detections)


_soft_nms = _library.define(
    "soft_nms(Tensor boxes, Tensor scores, Tensor labels, int method, float sigma, float iou_threshold, "
    "float score_threshold, int max_detections) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda boxes, scores, labels, method, sigma, iou_threshold, score_threshold, max_detections: (
        boxes.new_empty(boxes.shape[0], max_detections, 4),
        boxes.new_empty(boxes.shape[0], max_detections),
        labels.new_empty(boxes.shape[0], max_detections),
        labels.new_empty(boxes.shape[0], max_detections),
        labels.new_empty(boxes.shape[0]),
    ),
)


def soft_nms_padded(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    method: str,
    sigma: float,
    iou_threshold: float,
    score_threshold: float | None,
    max_detections: int,
) -> Detections:
    """``batched_nms_padded`` with a soft method; the arguments are checked, the labels int64."""
    if not _library.is_native(boxes):
        return soft_nms_padded_reference(
            boxes, scores, labels, method, sigma, iou_threshold, score_threshold, max_detections
        )
    lowest = _NEVER if score_threshold is None else score_threshold
    found = _soft_nms(
        boxes.contiguous(),
        scores.contiguous(),
        labels.contiguous(),
        SOFT_NMS_METHODS[method],
        sigma,
        iou_threshold,
        lowest,
        max_detections,
    )
    return Detections(*found)


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor | None = None,
    *,
    method: str = "gaussian",
    sigma: float = 0.5,
    iou_threshold: float = 0.3,
    score_threshold: float = 0.001,
    max_detections: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Lower the scores of boxes that overlap a better one of their class, instead of dropping them.

    Takes the best box, lowers the scores of those that overlap it, and so on (Bodla et al., Soft-NMS, arXiv:1704.04503).

    A box of score s that overlaps the one just taken goes on with s times
    ``gaussian``: exp(-IoU^2 / sigma);  ``linear``: 1 - IoU where IoU > ``iou_threshold``, 1 elsewhere. It is dropped as soon as
    its score is not above ``score_threshold``; the first box is no exception. A pair without an IoU (NaN in a box, no area)
    does not decay. Of equal scores the lower index comes first. A NaN score is above nothing: its box never takes part.

    The IoU is that of `nms` to the bit. Scores are computed in float32 (float64 for float64 inputs), so "linear" equals
    its formula in that precision to the bit; "gaussian" up to the rounding of exp.

    Args:
        boxes: ``[N, 4]``, (x1, y1, x2, y2); float16, bfloat16, float32 or float64; any strides.
        scores: ``[N]``, dtype of ``boxes``.
        idxs: ``[N]``, class of each box; any integer dtype; on the device of ``boxes`` or on the CPU. None is one class.
        method: "gaussian" or "linear".
        sigma: > 0; for "gaussian".
        iou_threshold: any number but NaN; for "linear".
        score_threshold: any number but NaN.
        max_detections: stop after that many, >= 1; None does not.

    Returns:
        Indices of the kept boxes, int64, in the order in which they were taken, which is that of descending decayed score, and
        those decayed scores, dtype of ``scores``. Their number depends on the values, so on a GPU the call waits for the device
        once; ``batched_nms_padded`` with a soft ``method`` never does. Deterministic. No gradient.

    Raises:
        TypeError: a dtype is not supported, or ``scores`` has another than ``boxes`` outside autocast; a number is not one.
        ValueError: shapes or devices do not fit, a threshold is NaN, ``sigma`` is not above 0, ``max_detections`` < 1, or
            ``method`` is unknown.
    """
    op = "soft_nms"
    boxes, scores = check_boxes(op, boxes, scores, batched=False)
    labels = torch.zeros_like(scores, dtype=torch.int64) if idxs is None else check_classes(op, "idxs", idxs, scores)
    check_choice(op, "method", method, SOFT_NMS_METHODS)
    sigma = check_sigma(op, sigma)
    iou_threshold = check_threshold(op, "iou_threshold", iou_threshold)
    score_threshold = check_threshold(op, "score_threshold", score_threshold)
    max_kept = max(1, scores.shape[0])
    if max_detections is not None:
        max_kept = min(max_kept, check_max_detections(op, max_detections))
    return _kept(
        soft_nms_padded(
            boxes[None], scores[None], labels[None], method, sigma, iou_threshold, score_threshold, max_kept
        )
    )


def check_sigma(op: str, sigma: float) -> float:
    sigma = check_threshold(op, "sigma", sigma)
    if not sigma > 0:
        raise ValueError(f"{op}: sigma must be above 0, got {sigma}")
    return sigma


def _kept(found: Detections) -> tuple[Tensor, Tensor]:
    indices, scores = found.indices[0], found.scores[0]
    rows = torch.where(indices >= 0)[0]
    return indices[rows], scores[rows]
