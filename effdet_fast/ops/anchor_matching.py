"""Which anchor answers for which object, and with which deltas: the targets of a batch of images."""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from effdet_fast._choices import BOX_CODERS_OR_NONE, FORCED_MATCHES
from effdet_fast.ops import _library
from effdet_fast.ops._arguments import (
    BACKGROUND,
    IGNORED,
    arithmetic_dtype,
    check_choice,
    check_floating,
    check_integer,
    check_same_device,
    may_read_values,
    number,
)
from effdet_fast.ops._boxes import encode_boxes, iou_with
from effdet_fast.ops._layout import dense, detached


class AnchorTargets(NamedTuple):
    """The targets of a detector's heads at A anchors, for a batch of B images.

    Attributes:
        labels: ``[B, A]`` int64; class of the matched object, -1 for background, -2 for ignored.
        boxes: ``[B, A, 4]``, float32 (float64 for float64 anchors); deltas of the matched object, 0 where there is none.
        num_positives: ``[B]`` float32, matched anchors of each image.
    """

    labels: Tensor
    boxes: Tensor
    num_positives: Tensor


def pairwise_iou(boxes: Tensor, anchors: Tensor) -> Tensor:
    """IoU ``[M, A]`` of boxes ``[M, 4]`` and anchors ``[A, 4]``, xyxy; 0 where it is not a number, as for two empty boxes."""
    iou = iou_with(boxes.unsqueeze(1), anchors)
    return torch.where(iou > 0, iou, 0)


def match_anchors_reference(
    anchors: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_counts: Tensor | None = None,
    *,
    pos_iou: float = 0.5,
    neg_iou: float = 0.5,
    force_match: bool = True,
    allow_low_quality_matches: bool = False,
    box_coder: str | None = "effdet",
    any_box: bool = False,
) -> AnchorTargets:
    """Reference for `match_anchors`: image by image, from the whole IoU matrix."""
    if not any_box:
        gt_labels = _labels_of_objects("match_anchors", anchors, gt_boxes, gt_labels, gt_counts)
    force = _force_rule(force_match, allow_low_quality_matches)
    dtype = arithmetic_dtype(anchors)
    anchors, gt_boxes, gt_labels = anchors.detach().to(dtype), gt_boxes.detach().to(dtype), gt_labels.long()
    batch, max_boxes = gt_labels.shape
    labels = gt_labels.new_full((batch, len(anchors)), BACKGROUND)
    deltas = gt_boxes.new_zeros(batch, len(anchors), 4)
    if len(anchors) and max_boxes:
        there = _there(gt_labels, gt_counts)
        for image in range(batch):
            iou = pairwise_iou(gt_boxes[image], anchors)
            matches = _match_image(iou, there[image], pos_iou, neg_iou, force)
            positive, row = matches >= 0, matches.clamp(min=0)
            labels[image] = torch.where(positive, gt_labels[image][row], matches)
            encoded = encode_boxes(gt_boxes[image][row], anchors, box_coder)
            deltas[image] = torch.where(positive.unsqueeze(1), encoded, 0)
    return AnchorTargets(labels, deltas, (labels >= 0).sum(1, dtype=torch.float32))


def _there(gt_labels: Tensor, gt_counts: Tensor | None) -> Tensor:
    """Which rows are objects, bool [B, M]."""
    there = gt_labels >= 0
    if gt_counts is not None:
        there = there & (torch.arange(gt_labels.shape[1], device=there.device) < gt_counts.unsqueeze(1))
    return there


def _match_image(iou: Tensor, there: Tensor, pos_iou: float, neg_iou: float, force: str) -> Tensor:
    """Row of `iou` [M, A] each anchor answers for, int64 [A], -1 for none, -2 for ignored. Rows not `there` take no part."""
    max_boxes = len(there)
    iou = torch.where(there.unsqueeze(1), iou, -1)
    best, row = iou.max(dim=0)  # of equal maxima `max` gives the first
    matches = torch.where(best >= pos_iou, row, torch.where(best >= neg_iou, IGNORED, BACKGROUND))
    if force == "first":
        # The lowest row claiming an anchor gets it; rows that are not there claim with a number nobody wants.
        claims = torch.where(there, torch.arange(max_boxes, device=iou.device), max_boxes)
        forced = torch.full_like(matches, max_boxes).scatter_reduce_(0, iou.argmax(dim=1), claims, "amin")
        matches = torch.where(forced < max_boxes, forced, matches)
    elif force == "ties":
        tied = ((iou == iou.amax(dim=1, keepdim=True)) & there.unsqueeze(1)).any(dim=0)
        matches = torch.where(tied, row, matches)
    return matches


def _force_rule(force_match: bool, allow_low_quality_matches: bool) -> str:
    return "first" if force_match else "ties" if allow_low_quality_matches else "none"


_match_anchors = _library.define(
    "match_anchors(Tensor anchors, Tensor gt_boxes, Tensor gt_labels, Tensor? gt_counts, float pos_iou, float neg_iou, "
    "int force, int box_coder, bool any_box) -> (Tensor, Tensor, Tensor)",
    lambda anchors, gt_boxes, gt_labels, *options: (
        gt_labels.new_empty(gt_labels.shape[0], anchors.shape[0]),
        anchors.new_empty(gt_labels.shape[0], anchors.shape[0], 4),
        gt_labels.new_empty(gt_labels.shape[0]),
    ),
)


def match_anchors(
    anchors: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_counts: Tensor | None = None,
    *,
    pos_iou: float = 0.5,
    neg_iou: float = 0.5,
    force_match: bool = True,
    allow_low_quality_matches: bool = False,
    box_coder: str | None = "effdet",
    any_box: bool = False,
) -> AnchorTargets:
    """Match each anchor to the object it overlaps most, if it overlaps it enough, and encode that object's box.

    The rule of Faster R-CNN and RetinaNet (Ren et al., arXiv:1506.01497, section 3.1.2; Lin et al., arXiv:1708.02002, section 4),
    as in effdet's ``AnchorLabeler`` and torchvision's ``Matcher``.

    With an anchor's highest IoU q over the objects of an image (of equal ones the first object's): q >= ``pos_iou`` makes it
    positive, ``neg_iou`` <= q < ``pos_iou`` ignored, anything less background. No object is left without an anchor:

    - ``force_match``: every object takes its best anchor, whatever the IoU. Of equally good anchors the first is taken; where
      several objects want the same anchor, the first object gets it. With the default thresholds this is effdet's
      ``AnchorLabeler``, whose choice among objects that want the same anchor is open.
    - ``allow_low_quality_matches``: every anchor that ties for the best of some object takes the object *it* overlaps most. With
      ``pos_iou=0.5, neg_iou=0.4, force_match=False, box_coder="torchvision"`` this is torchvision's RetinaNet. An object that
      overlaps no anchor ties with all of them, as in torchvision's ``Matcher``: such boxes are better dropped before.

    A box without area (x1 = x2 or y1 = y2) is no object: it takes part as little as a padding row.

    No M x A matrix is ever in memory, and nothing waits for the device.

    Args:
        anchors: ``[A, 4]``, (x1, y1, x2, y2); float16, bfloat16, float32 or float64. IoU and deltas are computed in float32, in
            float64 for float64 anchors; the IoU is rounded as PyTorch rounds the formula.
        gt_boxes: ``[B, M, 4]``, (x1, y1, x2, y2) in the anchors' units; floating. M may be 0.
        gt_labels: ``[B, M]``, class of each object; any integer dtype. A negative one marks a padding row, whose box may hold
            anything.
        gt_counts: ``[B]``, how many of each image's rows are objects; any integer dtype. None for all, but the padding rows.
        pos_iou: smallest IoU of a match that is not forced.
        neg_iou: smallest IoU of an anchor that is not background; in (0, ``pos_iou``].
        force_match: see above.
        allow_low_quality_matches: see above; not together with ``force_match``.
        box_coder: "effdet", the deltas (ty, tx, th, tw) with ``ty = (yc - yc_a) / h_a``, ``th = log(h / h_a)`` and 1e-7 added to
            every side; "torchvision", (dx, dy, dw, dh) with weights 1; None, the box (x1, y1, x2, y2) itself.
        any_box: every box is taken as it is: one without area is an object too, as in effdet, and none is refused.

    Returns:
        `AnchorTargets`. Deterministic. No gradient.

    Raises:
        TypeError: a dtype is not supported, or a number is not one.
        ValueError: shapes or devices do not fit, thresholds are out of order, both rules for best anchors are asked for, the
            coder is unknown, a count is not in [0, M], or an object's box is not finite or turned inside out (x2 < x1 or
            y2 < y1). Values are looked at on the CPU; on a GPU only after ``effdet_fast.set_debug(True)``, without which
            such a box gives deltas that are NaN.
    """
    op = "match_anchors"
    _check(op, anchors, gt_boxes, gt_labels, gt_counts)
    pos_iou, neg_iou = number(op, "pos_iou", pos_iou), number(op, "neg_iou", neg_iou)
    if not 0 < neg_iou <= pos_iou:
        raise ValueError(f"{op}: thresholds must be 0 < neg_iou <= pos_iou, got neg_iou={neg_iou}, pos_iou={pos_iou}")
    if force_match and allow_low_quality_matches:
        raise ValueError(f"{op}: force_match and allow_low_quality_matches exclude each other, got both")
    check_choice(op, "box_coder", box_coder, BOX_CODERS_OR_NONE)
    if not _library.is_native(anchors):
        return match_anchors_reference(
            anchors,
            gt_boxes,
            gt_labels,
            gt_counts,
            pos_iou=pos_iou,
            neg_iou=neg_iou,
            force_match=force_match,
            allow_low_quality_matches=allow_low_quality_matches,
            box_coder=box_coder,
            any_box=any_box,
        )
    dtype = arithmetic_dtype(anchors)
    arguments = (
        dense(detached(anchors), dtype),
        dense(detached(gt_boxes), dtype),
        dense(gt_labels, torch.int64),
        None if gt_counts is None else dense(gt_counts, torch.int64),
        pos_iou,
        neg_iou,
        FORCED_MATCHES[_force_rule(force_match, allow_low_quality_matches)],
        BOX_CODERS_OR_NONE[box_coder],
        bool(any_box),
    )
    if any_box:
        labels, boxes, counts = _match_anchors(*arguments)
    else:
        labels_of_objects = partial(_labels_of_objects, op, anchors, gt_boxes, gt_labels, gt_counts)
        if not anchors.is_cpu and may_read_values(gt_boxes):
            labels_of_objects()
        labels, boxes, counts = _library.explained(labels_of_objects, _match_anchors, *arguments)
    return AnchorTargets(labels, boxes, counts.float())


def _labels_of_objects(
    op: str, anchors: Tensor, gt_boxes: Tensor, gt_labels: Tensor, gt_counts: Tensor | None
) -> Tensor:
    """The labels, -1 where a box has no area. Raises ValueError for a broken box of an object, where values may be looked at."""
    labels, boxes, dtype = gt_labels, detached(gt_boxes), arithmetic_dtype(anchors)
    if labels.dtype != torch.int64 or boxes.dtype != dtype:
        labels, boxes = labels.long(), boxes.to(dtype)
    start, end = boxes.chunk(2, 2)
    if may_read_values(boxes) and boxes.numel():
        absent = labels < 0 if gt_counts is None else ~_there(labels, gt_counts)
        sides = (end - start).masked_fill_(absent.unsqueeze(2), 1)
        lowest, highest = torch.aminmax(sides)  # NaN if one of them is
        if not (lowest.item() >= 0 and highest.item() < math.inf):
            image, row = (~((sides >= 0) & (sides < math.inf))).any(2).nonzero()[0].tolist()
            raise ValueError(
                f"{op}: gt_boxes[{image}, {row}] (image {image}, box {row}) must be finite (x1, y1, x2, y2) with x1 <= x2 and "
                f"y1 <= y2, got {gt_boxes[image, row].tolist()}"
            )
        if lowest.item() > 0:
            return labels
    return labels.masked_fill((start == end).any(2), BACKGROUND)


def _check(op: str, anchors: Tensor, gt_boxes: Tensor, gt_labels: Tensor, gt_counts: Tensor | None) -> None:
    check_floating(op, "anchors", anchors)
    check_floating(op, "gt_boxes", gt_boxes)
    check_integer(op, "gt_labels", gt_labels)
    if anchors.dim() != 2 or anchors.shape[1] != 4:
        raise ValueError(f"{op}: anchors must have shape [A, 4], got {list(anchors.shape)}")
    shape = gt_boxes.shape
    if len(shape) != 3 or shape[2] != 4:
        raise ValueError(f"{op}: gt_boxes must have shape [B, M, 4], got {list(shape)}")
    batch, max_boxes, _ = shape
    if gt_labels.shape != (batch, max_boxes):
        raise ValueError(f"{op}: gt_labels must have shape {[batch, max_boxes]}, got {list(gt_labels.shape)}")
    check_same_device(op, "gt_boxes", gt_boxes, "anchors", anchors)
    check_same_device(op, "gt_labels", gt_labels, "anchors", anchors)
    if gt_counts is None:
        return
    check_integer(op, "gt_counts", gt_counts)
    if gt_counts.shape != (batch,):
        raise ValueError(f"{op}: gt_counts must have shape {[batch]}, got {list(gt_counts.shape)}")
    check_same_device(op, "gt_counts", gt_counts, "anchors", anchors)
    if may_read_values(gt_counts) and gt_counts.numel():
        wrong = gt_counts[(gt_counts < 0) | (gt_counts > max_boxes)]
        if wrong.numel():
            raise ValueError(f"{op}: gt_counts must be in [0, {max_boxes}], got {int(wrong[0])}")
