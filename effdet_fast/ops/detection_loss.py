"""The whole training loss of a one-stage detector: focal loss of all logits plus box loss, over all levels at once."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from effdet_fast._choices import BOX_CODERS, BOX_LOSSES, LOSS_NORMALIZERS
from effdet_fast.ops import _library
from effdet_fast.ops._arguments import arithmetic_dtype, may_read_values
from effdet_fast.ops._boxes import decode_boxes
from effdet_fast.ops._detection_loss_arguments import (
    check_anchors,
    check_num_classes,
    check_options,
    check_outputs,
    check_target_values,
    check_targets,
    concat_deltas,
    concat_labels,
)
from effdet_fast.ops._layout import dense
from effdet_fast.ops.focal_loss import (
    check_class_weight,
    check_focal_options,
    check_label_values,
    sigmoid_focal_loss_reference,
)

# torchvision's decoder limits the logarithm of a side relative to its anchor's.
GIOU_EPS = 1e-7


class DetectionLoss(NamedTuple):
    """The losses of a detector, scalars in float32 (float64 for float64 outputs): `total` = `cls` + box_loss_weight * `box`."""

    total: Tensor
    cls: Tensor
    box: Tensor


def per_anchor_view(output: Tensor, anchors_per_cell: int) -> Tensor:
    """A head output [B, A * K, H, W] seen as [B, H, W, A, K]; never copies, dense if the output is channels_last."""
    return output.unflatten(1, (anchors_per_cell, -1)).permute(0, 3, 4, 1, 2)


def detection_loss_reference(
    cls_outputs: Sequence[Tensor],
    box_outputs: Sequence[Tensor],
    cls_targets: Tensor | Sequence[Tensor],
    box_targets: Tensor | Sequence[Tensor],
    num_positives: Tensor,
    *,
    num_classes: int,
    alpha: float = 0.25,
    gamma: float = 1.5,
    delta: float = 0.1,
    box_loss_weight: float = 50.0,
    label_smoothing: float = 0.0,
    box_loss: str = "huber",
    normalizer: str = "batch",
    anchors: Tensor | None = None,
    box_coder: str = "effdet",
    class_weight: Tensor | None = None,
) -> DetectionLoss:
    """Reference for `detection_loss`: any device, differentiable by PyTorch. Half precision is computed in float32."""
    batch = cls_outputs[0].shape[0]
    dtype = arithmetic_dtype(cls_outputs[0])
    per_cell = cls_outputs[0].shape[1] // num_classes

    def concat(outputs: Sequence[Tensor]) -> Tensor:
        return torch.cat([per_anchor_view(x, per_cell).flatten(1, 3) for x in outputs], 1).to(dtype)

    logits, deltas = concat(cls_outputs), concat(box_outputs)
    labels, targets = concat_labels(cls_targets).long(), concat_deltas(box_targets).to(dtype)

    focal = sigmoid_focal_loss_reference(
        logits, labels, alpha, gamma, label_smoothing=label_smoothing, class_weight=class_weight
    )
    cls = focal.sum((1, 2))
    if box_loss == "huber":
        # A masked difference of exactly 0 has no loss, and no gradient either.
        error = (torch.where(targets != 0, deltas, 0) - targets).abs()
        quadratic = error.clamp(max=delta)  # PyTorch knows no tangent of the gradient of its huber_loss
        box = (quadratic * (error - quadratic / 2)).sum((1, 2)) / 4
    else:
        positive = (labels >= 0).unsqueeze(2)
        # Other anchors get harmless numbers first: their loss is dropped, and must not bring NaN into the gradient.
        deltas, targets = torch.where(positive, deltas, 0), torch.where(positive, targets, 0)
        if box_loss == "giou":
            assert anchors is not None
            anchors = anchors.to(dtype)
            unlimited = decode_boxes(targets, anchors, box_coder, limited=False)
            box = _giou_loss(decode_boxes(deltas, anchors, box_coder), unlimited).unsqueeze(2)
        elif box_loss == "l1":
            box = (deltas - targets).abs()
        else:
            box = F.smooth_l1_loss(deltas, targets, reduction="none", beta=delta)
        box = torch.where(positive, box, 0).sum((1, 2))

    positives = num_positives.to(dtype)
    if normalizer == "batch":
        cls, box = cls.sum() / (positives.sum() + 1), box.sum() / (positives.sum() + 1)
    else:
        per_image = positives.clamp(min=1) * max(batch, 1)
        cls, box = (cls / per_image).sum(), (box / per_image).sum()
    return DetectionLoss(cls + box_loss_weight * box, cls, box)


def _giou_loss(a: Tensor, b: Tensor) -> Tensor:
    """1 - GIoU of boxes xyxy (Rezatofighi et al., 2019), with torchvision's eps."""
    overlap = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    intersection = torch.where((overlap > 0).all(-1), overlap.prod(-1), 0)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - intersection
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    return 1 - intersection / (union + GIOU_EPS) + (hull - union) / (hull + GIOU_EPS)


def _grads_like(cls, box, channels_last) -> list[Tensor]:
    formats = [torch.channels_last if last else torch.contiguous_format for last in channels_last]
    return [
        torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
        for x, memory_format in zip([*cls, *box], formats, strict=True)
    ]


def _fake(cls, box, labels, box_targets, anchors, num_positives, class_weight, *options):
    dtype = arithmetic_dtype(cls[0])
    *_, channels_last, with_grad = options
    losses = [cls[0].new_empty((), dtype=dtype) for _ in range(3)]
    return *losses, _grads_like(cls, box, channels_last) if with_grad else []


def _backward_fake(grad_total, grad_cls, grad_box, cls, box, *arguments):
    return _grads_like(cls, box, arguments[-1])


_ARGUMENTS = (
    "Tensor[] cls, Tensor[] box, Tensor labels, Tensor box_targets, Tensor? anchors, Tensor num_positives, "
    "Tensor? class_weight, int num_classes, float alpha, float gamma, float label_smoothing, int box_loss, int box_coder, "
    "float delta, float box_loss_weight, int normalizer, bool[] channels_last"
)
_UPSTREAM = "Tensor? grad_total, Tensor? grad_cls, Tensor? grad_box"
_loss_and_grads = _library.define(
    f"detection_loss({_ARGUMENTS}, bool with_grad) -> (Tensor, Tensor, Tensor, Tensor[])", _fake
)
_loss_backward = _library.define(f"detection_loss_backward({_UPSTREAM}, {_ARGUMENTS}) -> Tensor[]", _backward_fake)
_rescale_ = _library.define(
    f"detection_loss_rescale_(Tensor(a!)[] grads, float box_loss_weight, {_UPSTREAM}) -> ()", lambda *arguments: None
)


class _DetectionLoss(torch.autograd.Function):
    """Forward writes the gradients for an upstream of 1. The first backward hands these buffers over, rescaled where need be, and
    forgets them; any further one computes them anew, so nothing that was handed out is written again."""

    @staticmethod
    def forward(ctx, options, arguments, labels, box_targets, anchors, num_positives, class_weight, *outputs):
        levels = len(outputs) // 2
        # float16 has no room for gradients that a loss scale has yet to multiply. A compiled backward must not change buffers.
        with_grad = outputs[0].dtype != torch.float16 and not torch.compiler.is_compiling()
        total, cls, box, grads = _loss_and_grads(
            outputs[:levels],
            outputs[levels:],
            labels,
            box_targets,
            anchors,
            num_positives,
            class_weight,
            *options,
            with_grad,
        )
        ctx.save_for_backward(labels, box_targets, anchors, num_positives, class_weight, *outputs)
        ctx.set_materialize_grads(False)
        ctx.options = options
        ctx.arguments = arguments
        ctx.grads = grads if with_grad else None
        return total, cls, box

    @staticmethod
    def backward(ctx, *upstream):
        labels, box_targets, anchors, num_positives, class_weight, *outputs = ctx.saved_tensors
        levels = len(outputs) // 2
        needs = ctx.needs_input_grad[7:]
        box_loss_weight = ctx.arguments["box_loss_weight"]
        grads: list[Tensor | None]
        if all([grad is None for grad in upstream]):
            grads = [None] * len(outputs)
        elif _library.wants_second_derivative():
            tensors = {"anchors": anchors, "class_weight": class_weight}
            known = [i for i, grad in enumerate(upstream) if grad is not None]

            def reference(*outputs: Tensor) -> list[Tensor]:
                losses = detection_loss_reference(
                    outputs[:levels], outputs[levels:], labels, box_targets, num_positives, **tensors, **ctx.arguments
                )
                return [losses[i] for i in known]

            grads = _library.gradients(reference, outputs, needs, [upstream[i] for i in known])
        elif ctx.grads is None or (box_loss_weight == 0 and upstream[2] is not None):
            given = (labels, box_targets, anchors, num_positives, class_weight)
            grads = _loss_backward(*upstream, outputs[:levels], outputs[levels:], *given, *ctx.options)
        else:
            grads, ctx.grads = ctx.grads, None
            _rescale_(grads, box_loss_weight, *upstream)
        return *(None,) * 7, *[g if need else None for g, need in zip(grads, needs, strict=True)]


def detection_loss(
    cls_outputs: Sequence[Tensor],
    box_outputs: Sequence[Tensor],
    cls_targets: Tensor | Sequence[Tensor],
    box_targets: Tensor | Sequence[Tensor],
    num_positives: Tensor,
    *,
    num_classes: int,
    alpha: float = 0.25,
    gamma: float = 1.5,
    delta: float = 0.1,
    box_loss_weight: float = 50.0,
    label_smoothing: float = 0.0,
    box_loss: str = "huber",
    normalizer: str = "batch",
    anchors: Tensor | None = None,
    box_coder: str = "effdet",
    class_weight: Tensor | None = None,
) -> DetectionLoss:
    """Compute a detector's class and box loss over all levels and images in one pass, which also writes the gradients.

    The defaults are effdet's ``loss_fn``: ``cls`` is the sum of `sigmoid_focal_loss` over all anchors and classes,
    ``box`` the Huber loss summed over the deltas whose target is not 0, divided by 4; both are divided by
    ``num_positives.sum() + 1``. RetinaNet as torchvision trains it is ``gamma=2, box_loss_weight=1, normalizer="per_image",
    box_coder="torchvision"`` and ``box_loss="l1"`` or "giou".

    Head outputs are read where they are, and their gradients written in the same layout: contiguous and channels_last, also
    slices of such tensors, without a copy; other strides are copied first. The gradient for an upstream gradient of 1 is
    written in the forward pass and handed out by the first backward, which rescales it only if the upstream gradient differs
    (without asking the host). In float16, under ``torch.compile`` and in a second backward it is computed from the outputs.

    Args:
        cls_outputs: 1 to 8 levels of logits ``[B, A * num_classes, H, W]``, channels in the order (anchor, class); float16,
            bfloat16, float32 or float64, one dtype for all outputs (under autocast they are promoted to the widest).
            Arithmetic is in float32 (float64 for float64).
        box_outputs: for each level the deltas ``[B, A * 4, H, W]``, channels in the order (anchor, delta).
        cls_targets: integers ``[B, N]``, N the number of anchors of all levels in the order (level, row, column, anchor), or for
            each level ``[B, H, W, A]``: a class in [0, num_classes), -1 for background, -2 for ignored (no class loss).
        box_targets: deltas ``[B, N, 4]``, or for each level ``[B, H, W, A * 4]``, floating.
        num_positives: ``[B]``, the number of positive anchors of each image; with normalizer "batch" also one 0-d value for all.
        num_classes: number of classes.
        alpha: as in `sigmoid_focal_loss`.
        gamma: as in `sigmoid_focal_loss`.
        delta: where "huber" turns from quadratic to linear (then with slope ``delta``); the ``beta`` of "smooth_l1".
        box_loss_weight: of the box loss in ``total``.
        label_smoothing: as in `sigmoid_focal_loss`.
        box_loss: "huber" as above; or over the anchors with a label >= 0: "l1" and "smooth_l1", summed over the four deltas
            (smooth_l1: ``e^2 / (2 delta)`` where ``|e| < delta``, else ``|e| - delta / 2``), or "giou",
            ``1 - GIoU`` of the boxes that outputs and targets stand for, as ``torchvision.ops.generalized_box_iou_loss``.
        normalizer: "batch" divides by ``num_positives.sum() + 1``; "per_image" divides each image's sums by
            ``max(1, num_positives)`` and takes the mean over images.
        anchors: ``[N, 4]`` xyxy, needed by "giou" alone, which decodes with them.
        box_coder: what the deltas mean to "giou": "effdet" is (ty, tx, th, tw), not limited; "torchvision" is (dx, dy, dw, dh)
            with weights of 1, where outputs (not targets) dw and dh are limited to log(1000 / 16).
        class_weight: ``[num_classes]``, floating: multiplies the focal losses of each class's logits, as in
            `sigmoid_focal_loss`. No gradient flows to it.

    Returns:
        ``DetectionLoss(total, cls, box)``, scalars in float32 (float64 for float64 outputs), each differentiable with respect to
        the outputs. Deterministic: the same bits in every run and for every thread count. Twice differentiable.

    Raises:
        TypeError: an argument has the wrong type, or dtypes are not supported or differ outside autocast.
        ValueError: numbers of levels, shapes or devices do not fit, an option is out of range, a target requires a gradient, a
            label is >= num_classes or < -2, or ``box_targets`` ("huber": any; else of a label >= 0) or, with "giou", ``anchors``
            (of a label >= 0) make the loss infinite or NaN. Values are looked at on the CPU; on a GPU only after
            ``effdet_fast.set_debug(True)``.
    """
    op = "detection_loss"
    num_classes = check_num_classes(op, num_classes)
    alpha, gamma, label_smoothing = check_focal_options(op, alpha, gamma, label_smoothing)
    delta, box_loss_weight = check_options(op, delta, box_loss_weight, box_loss, normalizer, box_coder)
    cls_outputs, box_outputs = check_outputs(op, cls_outputs, box_outputs, num_classes)
    labels, deltas, positives = check_targets(
        op, cls_outputs, cls_targets, box_targets, num_positives, num_classes, normalizer
    )
    first = cls_outputs[0]
    check_anchors(op, anchors, box_loss, first, labels.shape[1])
    if class_weight is not None:
        check_class_weight(op, class_weight, "cls_outputs[0]", first, num_classes)
    arguments: dict[str, Any] = {
        "num_classes": num_classes,
        "alpha": alpha,
        "gamma": gamma,
        "delta": delta,
        "box_loss_weight": box_loss_weight,
        "label_smoothing": label_smoothing,
        "box_loss": box_loss,
        "normalizer": normalizer,
        "box_coder": box_coder,
    }
    given = (cls_outputs, box_outputs, labels, deltas, positives)
    look_at_labels = partial(check_label_values, op, labels, num_classes)
    native = _library.is_native(first)
    if not (native and first.is_cpu):
        look_at_labels()
    if native:
        loss = _library.explained(look_at_labels, _native, *given, anchors, class_weight, arguments)
    else:
        loss = detection_loss_reference(*given, anchors=anchors, class_weight=class_weight, **arguments)
    if may_read_values(loss.box) and not math.isfinite(loss.box.item()):  # that sees a broken target at no price
        check_target_values(op, labels, deltas, anchors, box_loss)
    return loss


def _native(
    cls_outputs, box_outputs, labels, deltas, positives, anchors, class_weight, arguments: dict[str, Any]
) -> DetectionLoss:
    first, box_loss = cls_outputs[0], arguments["box_loss"]
    dtype = arithmetic_dtype(first)
    outputs, channels_last = zip(*map(_readable, [*cls_outputs, *box_outputs]), strict=True)
    labels = dense(labels, torch.int32 if labels.dtype == torch.int32 else torch.int64)
    deltas, positives = dense(deltas, dtype), dense(positives, dtype)
    anchors = dense(anchors, dtype) if anchors is not None and box_loss == "giou" else None
    class_weight = None if class_weight is None else dense(class_weight, dtype)
    options = (
        arguments["num_classes"],
        arguments["alpha"],
        arguments["gamma"],
        arguments["label_smoothing"],
        BOX_LOSSES[box_loss],
        BOX_CODERS[arguments["box_coder"]],
        arguments["delta"],
        arguments["box_loss_weight"],
        LOSS_NORMALIZERS[arguments["normalizer"]],
        channels_last,
    )
    given = (labels, deltas, anchors, positives, class_weight)
    if torch.is_grad_enabled() and any([x.requires_grad for x in outputs]):
        return DetectionLoss(*_DetectionLoss.apply(options, arguments, *given, *outputs))
    levels = len(cls_outputs)
    return DetectionLoss(*_loss_and_grads(outputs[:levels], outputs[levels:], *given, *options, False)[:3])


def _readable(x: Tensor) -> tuple[Tensor, bool]:
    """The output as the kernels read it, with pixels one stride apart and channels or pixels innermost; whether channels are."""
    _, _, height, width = x.shape
    _, channel, row, column = x.stride()
    if height <= 1 or width <= 1 or row == width * column:
        if channel == 1:
            return x, True
        if height * width <= 1 or (column if width > 1 else row) == 1:
            return x, False
    return x.contiguous(), False
