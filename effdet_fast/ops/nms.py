"""Non-maximum suppression: of one set of boxes, per class, and of a whole batch with fixed output shapes."""

import torch
from torch import Tensor

from effdet_fast._choices import MAX_KEPT_IN_BLOCK, NMS_METHODS
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
from effdet_fast.ops.soft_nms import check_sigma, soft_nms_padded, soft_nms_padded_reference


def nms_reference(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Reference for `nms`: one box after the other."""
    return batched_nms_reference(boxes, scores, torch.zeros_like(scores, dtype=torch.int64), iou_threshold)


def batched_nms_reference(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Reference for `batched_nms`: one box after the other."""
    order = scores.argsort(descending=True, stable=True)
    ranked, classes = boxes.detach().to(arithmetic_dtype(boxes))[order], idxs.to(boxes.device)[order]
    keep = torch.ones_like(classes, dtype=torch.bool)
    for i in range(len(order)):
        if keep[i]:
            suppressed = (iou_with(ranked[i, None], ranked[i + 1 :]).double() > iou_threshold) & (
                classes[i + 1 :] == classes[i]
            )
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
    sigma: float = 0.5,
) -> Detections:
    """Reference for `batched_nms_padded`: takes the best box left of every image, ``max_detections`` times."""
    check_choice("batched_nms_padded_reference", "method", method, NMS_METHODS)
    boxes, scores, labels = boxes.detach(), scores.detach(), labels.to(boxes.device).long()
    if method != "hard":
        return soft_nms_padded_reference(
            boxes, scores, labels, method, sigma, iou_threshold, score_threshold, max_detections
        )
    batch, n = scores.shape
    ranked_scores, order = scores.sort(dim=1, descending=True, stable=True)
    ranked = boxes.to(arithmetic_dtype(boxes)).gather(1, order.unsqueeze(-1).expand(-1, -1, 4))
    classes = labels.gather(1, order)
    alive = torch.ones_like(order, dtype=torch.bool)
    if score_threshold is not None:
        alive = ranked_scores.double() > score_threshold
    rows = min(max_detections, n)
    picks = order.new_full((batch, rows), -1)
    for k in range(rows):
        best = alive.long().argmax(1, keepdim=True)  # the first that is alive, where there is one
        found = alive.gather(1, best)
        picks[:, k] = torch.where(found, order.gather(1, best), -1).squeeze(1)
        box = ranked.gather(1, best.unsqueeze(-1).expand(-1, -1, 4))
        suppressed = (iou_with(box, ranked).double() > iou_threshold) & (classes == classes.gather(1, best))
        alive = (alive & ~suppressed).scatter(1, best, False)
    return padded_to(detections_of(boxes, scores.gather(1, picks.clamp(min=0)), labels, picks), max_detections)


_nms = _library.define(
    "nms(Tensor boxes, Tensor? labels, float iou_threshold, int max_kept) -> Tensor",
    lambda boxes, labels, iou_threshold, max_kept: boxes.new_empty(boxes.shape[:2], dtype=torch.bool),
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
    """Suppress boxes that overlap a better one: an IoU above the threshold with a kept box of a higher score drops a box.

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
        the device once; `batched_nms_padded` never does. Deterministic. No gradient.

    Raises:
        TypeError: a dtype is not supported, or ``scores`` has another than ``boxes`` outside autocast; a number is not one.
        ValueError: shapes or devices do not fit, or the threshold is NaN.
    """
    boxes, scores = check_boxes("nms", boxes, scores, batched=False)
    iou_threshold = check_threshold("nms", "iou_threshold", iou_threshold)
    if not _library.is_native(boxes):
        return nms_reference(boxes, scores, iou_threshold)
    order = scores.argsort(descending=True, stable=True)
    keep = _nms(boxes.index_select(0, order).unsqueeze(0), None, iou_threshold, len(order))
    return order.masked_select(keep.squeeze(0))


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Suppress overlapping boxes within each class, as ``torchvision.ops.batched_nms`` does in a loop over the classes.

    Classes are compared by id, so coordinates may be negative and ids of any size.

    Args:
        boxes: ``[N, 4]``, as in `nms`.
        scores: ``[N]``, dtype of ``boxes``.
        idxs: ``[N]``, class of each box; any integer dtype; on the device of ``boxes`` or on the CPU.
        iou_threshold: as in `nms`.

    Returns:
        Indices of the kept boxes of all classes, int64, by descending score; see `nms`.

    Raises:
        TypeError: a dtype is not supported, or ``scores`` has another than ``boxes`` outside autocast; a number is not one.
        ValueError: shapes or devices do not fit, or the threshold is NaN.
    """
    boxes, scores = check_boxes("batched_nms", boxes, scores, batched=False)
    idxs = check_classes("batched_nms", "idxs", idxs, scores)
    iou_threshold = check_threshold("batched_nms", "iou_threshold", iou_threshold)
    if not _library.is_native(boxes):
        return batched_nms_reference(boxes, scores, idxs, iou_threshold)
    if 0 < len(scores) <= MAX_KEPT_IN_BLOCK:  # as the one image of a batch, whose kernel takes classes in any order
        ranked, order = scores.unsqueeze(0).sort(dim=1, descending=True, stable=True)
        picks = _hard_nms_padded(
            boxes.unsqueeze(0), ranked, order, idxs.unsqueeze(0), iou_threshold, None, len(scores)
        ).indices
        return picks.masked_select(picks >= 0)
    ranking = scores.argsort(descending=True, stable=True)
    # The kernel wants each class in one piece. `index_select` is the cheaper call where indexing would do the same.
    classes, by_class = idxs.index_select(0, ranking).sort(stable=True)
    candidates = boxes.index_select(0, ranking.index_select(0, by_class))
    keep = _nms(candidates.unsqueeze(0), classes.unsqueeze(0), iou_threshold, len(ranking)).squeeze(0)
    return ranking.masked_select(torch.empty_like(keep).scatter_(0, by_class, keep))


def batched_nms_padded(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    iou_threshold: float,
    *,
    max_detections: int = 100,
    score_threshold: float | None = None,
    method: str = "hard",
    sigma: float = 0.5,
) -> Detections:
    """Suppress overlapping boxes within each class of a whole batch, and give the best of each image in outputs of fixed shape.

    Never waits for the device and can be captured in a CUDA graph (with the labels on the device: copying them there waits). An
    image equals ``batched_nms`` (or ``soft_nms``) of its boxes above the score threshold, truncated. Work stops at
    ``max_detections``.

    Args:
        boxes: ``[B, N, 4]``, (x1, y1, x2, y2); float16, bfloat16, float32 or float64; any strides.
        scores: ``[B, N]``, dtype of ``boxes``.
        labels: ``[B, N]``, class of each box; any integer dtype; on the device of ``boxes`` or on the CPU.
        iou_threshold: as in `nms`.
        max_detections: K, >= 1.
        score_threshold: boxes with ``score > score_threshold`` take part, all without one. A NaN score is not greater than
            anything, so a threshold drops it; without one it comes first, as in `nms`.
        method: "hard", or "gaussian" and "linear" for `soft_nms`, whose rules then hold: scores decay, only "linear"
            looks at ``iou_threshold``, and a NaN score never takes part.
        sigma: width of the gaussian method, > 0.

    Returns:
        `Detections` with K rows per image, by descending (decayed) score. Deterministic. No gradient.

    Raises:
        TypeError: a dtype is not supported, or ``scores`` has another than ``boxes`` outside autocast; a number is not one.
        ValueError: shapes or devices do not fit, a threshold is NaN, ``max_detections`` < 1, ``sigma`` is not above 0, or
            ``method`` is unknown.
    """
    op = "batched_nms_padded"
    boxes, scores = check_boxes(op, boxes, scores, batched=True)
    labels = check_classes(op, "labels", labels, scores)
    iou_threshold = check_threshold(op, "iou_threshold", iou_threshold)
    if score_threshold is not None:
        score_threshold = check_threshold(op, "score_threshold", score_threshold)
    max_detections = check_max_detections(op, max_detections)
    check_choice(op, "method", method, NMS_METHODS)
    sigma = check_sigma(op, sigma)
    if method != "hard":
        return soft_nms_padded(boxes, scores, labels, method, sigma, iou_threshold, score_threshold, max_detections)
    if not _library.is_native(boxes):
        return batched_nms_padded_reference(
            boxes, scores, labels, iou_threshold, max_detections=max_detections, score_threshold=score_threshold
        )
    ranked, order = scores.contiguous().sort(dim=1, descending=True, stable=True)
    return _hard_nms_padded(boxes, ranked, order, labels, iou_threshold, score_threshold, max_detections)


def ranked_nms_padded(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    method: str,
    sigma: float,
    iou_threshold: float,
    score_threshold: float | None,
    max_detections: int,
) -> Detections:
    """`batched_nms_padded` of boxes that come by descending score; arguments are checked, and kernels are there."""
    if method != "hard":
        return soft_nms_padded(boxes, scores, labels, method, sigma, iou_threshold, score_threshold, max_detections)
    order = torch.arange(scores.shape[1], device=scores.device).repeat(len(scores), 1)
    return _hard_nms_padded(boxes, scores, order, labels, iou_threshold, score_threshold, max_detections)


def _hard_nms_padded(
    boxes: Tensor,
    ranked_scores: Tensor,
    order: Tensor,
    labels: Tensor,
    iou_threshold: float,
    score_threshold: float | None,
    max_detections: int,
) -> Detections:
    if min(boxes.shape[1], max_detections) > MAX_KEPT_IN_BLOCK:
        return _nms_padded_by_class(boxes, ranked_scores, order, labels, iou_threshold, score_threshold, max_detections)
    found = _nms_padded(
        boxes.contiguous(), ranked_scores, order, labels.contiguous(), iou_threshold, score_threshold, max_detections
    )
    return Detections(*found)


def _nms_padded_by_class(
    boxes: Tensor,
    ranked_scores: Tensor,
    order: Tensor,
    labels: Tensor,
    iou_threshold: float,
    score_threshold: float | None,
    max_detections: int,
) -> Detections:
    """All classes of all images at the same time; what they keep is joined by rank and cut to the best."""
    classes, by_class = labels.gather(1, order).sort(dim=1, stable=True)
    candidates = boxes.gather(1, order.gather(1, by_class).unsqueeze(-1).expand(-1, -1, 4))
    rows = min(max_detections, order.shape[1])
    takes_part, max_kept = torch.ones_like(order, dtype=torch.bool), rows
    if score_threshold is not None:
        takes_part = ranked_scores.double() > score_threshold
        # NaN scores rank first and must suppress nothing, as a box of NaN does. Such boxes are kept, so a class may need more.
        candidates = candidates.masked_fill(~takes_part.gather(1, by_class).unsqueeze(-1), float("nan"))
        max_kept = order.shape[1]
    kept = _nms(candidates, classes, iou_threshold, max_kept)
    kept = torch.empty_like(kept).scatter_(1, by_class, kept) & takes_part
    row = kept.cumsum(1) - 1
    row = torch.where(kept & (row < rows), row, rows)  # the row past the last takes all the others
    picks = order.new_full((len(order), rows + 1), -1).scatter_(1, row, order)[:, :-1].contiguous()
    found = ranked_scores.new_zeros(len(order), rows + 1).scatter_(1, row, ranked_scores)[:, :-1]
    return padded_to(detections_of(boxes, found, labels, picks), max_detections)
