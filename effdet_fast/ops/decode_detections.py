"""From head outputs to detections: the best scores of all levels and classes, their boxes, non-maximum suppression."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from effdet_fast._choices import BOX_CODERS, MAX_DECODED_LEVELS, NMS_METHODS
from effdet_fast.ops import _library
from effdet_fast.ops._arguments import (
    arithmetic_dtype,
    check_choice,
    check_floating,
    check_same_device,
    dtype_name,
    integer,
)
from effdet_fast.ops._boxes import Detections, check_max_detections, check_threshold, decode_boxes, is_empty, with_rows
from effdet_fast.ops._layout import dense
from effdet_fast.ops.nms import batched_nms_padded_reference, ranked_nms_padded
from effdet_fast.ops.soft_nms import check_sigma

_Candidates = tuple[Tensor, Tensor, Tensor, Tensor]


def decode_detections_reference(
    cls_outputs: Sequence[Tensor],
    box_outputs: Sequence[Tensor],
    anchors: Tensor,
    *,
    num_classes: int,
    max_candidates: int = 5000,
    score_threshold: float | None = None,
    iou_threshold: float = 0.5,
    max_detections: int = 100,
    clip_sizes: Tensor | None = None,
    box_coder: str = "effdet",
    method: str = "hard",
    sigma: float = 0.5,
    candidates_per_level: bool = False,
    drop_empty: bool = False,
) -> Detections:
    """Reference for `decode_detections`; in float64 where the inputs are."""
    options = (clip_sizes, num_classes, max_candidates, box_coder)
    boxes, scores, labels, anchor_indices = _candidates(
        decode_candidates_reference, cls_outputs, box_outputs, anchors, options, candidates_per_level
    )

    def suppress(scores: Tensor, threshold: float | None) -> Detections:
        return batched_nms_padded_reference(
            boxes,
            scores,
            labels,
            iou_threshold,
            max_detections=max_detections,
            score_threshold=threshold,
            method=method,
            sigma=sigma,
        )

    return _suppressed(suppress, boxes, scores, anchor_indices, method, score_threshold, drop_empty)


def _candidates(
    decode: Callable[..., _Candidates],
    cls_outputs: Sequence[Tensor],
    box_outputs: Sequence[Tensor],
    anchors: Tensor,
    options: tuple,
    per_level: bool,
) -> _Candidates:
    """The best of all levels together, or one after the other the best of each."""
    if not per_level:
        return decode(cls_outputs, box_outputs, anchors, *options)
    levels, start = [], 0
    for cls_output, box_output in zip(cls_outputs, box_outputs, strict=True):
        end = start + box_output.shape[1] // 4 * box_output.shape[2] * box_output.shape[3]
        boxes, scores, labels, indices = decode([cls_output], [box_output], anchors[start:end], *options)
        levels.append((boxes, scores, labels, indices + start))
        start = end
    boxes, scores, labels, indices = (torch.cat(parts, 1) for parts in zip(*levels, strict=True))
    return boxes, scores, labels, indices


def decode_candidates_reference(
    cls_outputs: Sequence[Tensor],
    box_outputs: Sequence[Tensor],
    anchors: Tensor,
    clip_sizes: Tensor | None,
    num_classes: int,
    max_candidates: int,
    box_coder: str,
) -> _Candidates:
    """Boxes ``[B, K, 4]``, scores, labels and anchor indices ``[B, K]`` of the best K logits, best first."""
    batch = cls_outputs[0].shape[0]
    logits, deltas = (
        torch.cat([x.detach().permute(0, 2, 3, 1).flatten(1) for x in outputs], 1)
        for outputs in (cls_outputs, box_outputs)
    )
    deltas = deltas.view(batch, anchors.shape[0], 4)
    ranked, order = logits.sort(dim=1, descending=True, stable=True)
    ranked, order = ranked[:, :max_candidates], order[:, :max_candidates]
    anchor_indices = torch.div(order, num_classes, rounding_mode="floor")
    deltas = deltas.gather(1, anchor_indices.unsqueeze(-1).expand(-1, -1, 4)).to(arithmetic_dtype(deltas))
    boxes = decode_boxes(deltas, anchors.to(deltas.dtype)[anchor_indices], box_coder)
    if clip_sizes is not None:
        limits = clip_sizes.to(boxes).flip(1).repeat(1, 2).unsqueeze(1)
        boxes = torch.minimum(boxes.clamp(min=0), limits)
    return boxes, ranked.to(arithmetic_dtype(ranked)).sigmoid(), order - anchor_indices * num_classes, anchor_indices


def _fake_candidates(
    cls_outputs: list[Tensor],
    box_outputs: list[Tensor],
    anchors: Tensor,
    clip_sizes: Tensor | None,
    num_classes: int,
    max_candidates: int,
    box_coder: int,
) -> _Candidates:
    batch, count = cls_outputs[0].shape[0], min(max_candidates, anchors.shape[0] * num_classes)
    return (
        anchors.new_empty(batch, count, 4),
        anchors.new_empty(batch, count),
        anchors.new_empty(batch, count, dtype=torch.int64),
        anchors.new_empty(batch, count, dtype=torch.int64),
    )


_decode_candidates = _library.define(
    "decode_candidates(Tensor[] cls_outputs, Tensor[] box_outputs, Tensor anchors, Tensor? clip_sizes, int num_classes, "
    "int max_candidates, int box_coder) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_candidates,
)


def decode_detections(
    cls_outputs: Sequence[Tensor],
    box_outputs: Sequence[Tensor],
    anchors: Tensor,
    *,
    num_classes: int,
    max_candidates: int = 5000,
    score_threshold: float | None = None,
    iou_threshold: float = 0.5,
    max_detections: int = 100,
    clip_sizes: Tensor | None = None,
    box_coder: str = "effdet",
    method: str = "hard",
    sigma: float = 0.5,
    candidates_per_level: bool = False,
    drop_empty: bool = False,
) -> Detections:
    """Turn the raw outputs of a detector's heads into detections: take the best scores, decode their boxes, suppress overlaps.

    What effdet's ``DetBenchPredict`` and torchvision's ``RetinaNet.postprocess_detections`` do; boxes are coded as in R-CNN
    (Girshick et al., arXiv:1311.2524, appendix C).

    Per image, the ``max_candidates`` largest logits over all levels, anchors and classes are found, of equal ones those that come
    first in the order (level, row, column, anchor, class); their scores are sigmoids, their boxes are decoded from their anchors
    and clipped; then `batched_nms_padded` runs. Nothing waits for the device, and a CUDA graph can capture it.

    As in ``torch.topk``, a NaN logit is greater than all others: such candidates come first. A score threshold drops them, as do
    the soft methods; without one they are detected first. -0.0 equals 0.0.

    Args:
        cls_outputs: per level ``[B, A * num_classes, H, W]`` logits; float16, bfloat16, float32 or float64; NCHW or channels_last
            (other strides are copied); at most 16 levels.
        box_outputs: per level ``[B, A * 4, H, W]`` deltas, dtype of ``cls_outputs``.
        anchors: ``[N, 4]`` (x1, y1, x2, y2), floating, ordered (level, row, column, anchor).
        num_classes: C, >= 1.
        max_candidates: how many logits go on, >= 1.
        score_threshold: as in `batched_nms_padded`.
        iou_threshold: as in `batched_nms_padded`.
        max_detections: as in `batched_nms_padded`.
        clip_sizes: ``[B, 2]`` (height, width) that boxes are clipped to before the suppression; None does not clip.
        box_coder: "effdet": deltas (ty, tx, th, tw), unbounded; "torchvision": (dx, dy, dw, dh), dw and dh at most
            log(1000 / 16).
        method: as in `batched_nms_padded`.
        sigma: as in `batched_nms_padded`.
        candidates_per_level: take ``max_candidates`` logits of each level, as torchvision's RetinaNet does, not of all levels.
        drop_empty: leave out candidates whose box has no area once it is clipped, which lay outside, before they count towards
            ``max_detections``. effdet and torchvision keep them.

    Returns:
        `Detections` with boxes and scores in float32 (float64 for float64 outputs), classes as ``labels`` and the rows of
        ``anchors`` as ``indices``. Deterministic. No gradient.

    Raises:
        TypeError: something is not a tensor, or dtypes are not supported or differ; a number is not one.
        ValueError: shapes or devices do not fit, or an option is out of its range.
    """
    op = "decode_detections"
    num_classes = _at_least_1(op, "num_classes", num_classes)
    max_candidates = _at_least_1(op, "max_candidates", max_candidates)
    _check(op, cls_outputs, box_outputs, anchors, num_classes, clip_sizes)
    iou_threshold = check_threshold(op, "iou_threshold", iou_threshold)
    if score_threshold is not None:
        score_threshold = check_threshold(op, "score_threshold", score_threshold)
    max_detections = check_max_detections(op, max_detections)
    check_choice(op, "box_coder", box_coder, BOX_CODERS)
    check_choice(op, "method", method, NMS_METHODS)
    sigma = check_sigma(op, sigma)
    if not _library.is_native(anchors):
        return decode_detections_reference(
            cls_outputs,
            box_outputs,
            anchors,
            num_classes=num_classes,
            max_candidates=max_candidates,
            score_threshold=score_threshold,
            iou_threshold=iou_threshold,
            max_detections=max_detections,
            clip_sizes=clip_sizes,
            box_coder=box_coder,
            method=method,
            sigma=sigma,
            candidates_per_level=candidates_per_level,
            drop_empty=drop_empty,
        )
    dtype = arithmetic_dtype(cls_outputs[0])
    boxes, scores, labels, anchor_indices = _candidates(
        _decode_candidates,
        [_dense(x) for x in cls_outputs],
        [_dense(x) for x in box_outputs],
        dense(anchors.detach(), dtype),
        (
            None if clip_sizes is None else dense(clip_sizes.detach(), dtype),
            num_classes,
            max_candidates,
            BOX_CODERS[box_coder],
        ),
        candidates_per_level,
    )
    if candidates_per_level:  # each level's candidates come by score, all together do not
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        boxes = boxes.gather(1, order.unsqueeze(-1).expand(-1, -1, 4))
        labels, anchor_indices = labels.gather(1, order), anchor_indices.gather(1, order)

    def suppress(scores: Tensor, threshold: float | None) -> Detections:
        return ranked_nms_padded(boxes, scores, labels, method, sigma, iou_threshold, threshold, max_detections)

    return _suppressed(suppress, boxes, scores, anchor_indices, method, score_threshold, drop_empty)


def _suppressed(
    suppress: Callable[[Tensor, float | None], Detections],
    boxes: Tensor,
    scores: Tensor,
    anchor_indices: Tensor,
    method: str,
    score_threshold: float | None,
    drop_empty: bool,
) -> Detections:
    """What is left of the candidates, with their anchors as indices. The suppression takes scores and their threshold."""
    # Under a threshold no NaN takes part. A score that is NaN itself goes through as infinity, which is as far in front.
    nan_takes_part = drop_empty and score_threshold is None and method == "hard"
    if nan_takes_part:
        scores, score_threshold = scores.masked_fill(scores.isnan(), math.inf), -1.0
    if drop_empty:
        scores = scores.masked_fill(is_empty(boxes), math.nan)
    found = suppress(scores, score_threshold)
    kept_scores = found.scores.masked_fill(found.scores == math.inf, math.nan) if nan_takes_part else found.scores
    indices = _anchors_of(found.indices, anchor_indices)
    # torch 2.11 cannot trace _replace.
    return Detections(found.boxes, kept_scores, found.labels, indices, found.counts)


def _anchors_of(picks: Tensor, anchor_indices: Tensor) -> Tensor:
    """The anchors ``[B, K]`` of candidates; -1 where there is none, as past the number of candidates."""
    max_detections, rows = picks.shape[1], min(picks.shape[1], anchor_indices.shape[1])
    if rows < max_detections:
        picks = picks[:, :rows]
    anchors = torch.where(picks >= 0, anchor_indices.gather(1, picks.clamp(min=0)), -1)
    return with_rows(anchors, max_detections, -1) if rows < max_detections else anchors


def _dense(x: Tensor) -> Tensor:
    is_dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    return x.detach() if is_dense else x.detach().contiguous()


def _at_least_1(op: str, name: str, value: int) -> int:
    value = integer(op, name, value)
    if value < 1:
        raise ValueError(f"{op}: {name} must be an int >= 1, got {value}")
    return value


def _check(
    op: str,
    cls_outputs: Sequence[Tensor],
    box_outputs: Sequence[Tensor],
    anchors: Tensor,
    num_classes: int,
    clip_sizes: Tensor | None,
) -> None:
    check_floating(op, "anchors", anchors)
    if not 1 <= len(cls_outputs) <= MAX_DECODED_LEVELS or len(box_outputs) != len(cls_outputs):
        raise ValueError(
            f"{op}: cls_outputs and box_outputs must have 1 to {MAX_DECODED_LEVELS} levels each, and as many, "
            f"got {len(cls_outputs)} and {len(box_outputs)}"
        )
    for name, outputs in (("cls_outputs", cls_outputs), ("box_outputs", box_outputs)):
        for i, x in enumerate(outputs):
            check_floating(op, f"{name}[{i}]", x)
            check_same_device(op, f"{name}[{i}]", x, "anchors", anchors)
            if x.dtype != cls_outputs[0].dtype:
                expected = dtype_name(cls_outputs[0].dtype)
                raise TypeError(f"{op}: {name}[{i}] must be {expected} as cls_outputs[0], got {dtype_name(x.dtype)}")
    first = cls_outputs[0]
    if first.dim() != 4 or first.shape[1] % num_classes:
        raise ValueError(
            f"{op}: cls_outputs[0] must have shape [B, A * num_classes, H, W], num_classes {num_classes}, got {list(first.shape)}"
        )
    batch, per_cell, cells = first.shape[0], first.shape[1] // num_classes, 0
    for i, (cls_output, box_output) in enumerate(zip(cls_outputs, box_outputs, strict=True)):
        for name, x, channels in (
            ("cls_outputs", cls_output, first.shape[1]),
            ("box_outputs", box_output, per_cell * 4),
        ):
            expected_shape = [batch, channels, *cls_output.shape[2:]]
            if x.dim() != 4 or list(x.shape) != expected_shape:
                expected = f"[{batch}, {channels}, H, W]" if x is cls_output else str(expected_shape)
                raise ValueError(f"{op}: {name}[{i}] must have shape {expected}, got {list(x.shape)}")
        cells += cls_output.shape[2] * cls_output.shape[3]
    if list(anchors.shape) != [cells * per_cell, 4]:
        raise ValueError(f"{op}: anchors must have shape [{cells * per_cell}, 4], got {list(anchors.shape)}")
    if clip_sizes is not None:
        check_same_device(op, "clip_sizes", clip_sizes, "anchors", anchors)
        if list(clip_sizes.shape) != [batch, 2]:
            raise ValueError(f"{op}: clip_sizes must have shape [{batch}, 2], got {list(clip_sizes.shape)}")
