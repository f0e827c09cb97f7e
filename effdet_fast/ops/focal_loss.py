"""Sigmoid focal loss (Lin et al., "Focal Loss for Dense Object Detection", 2017), from labels or from soft targets."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from effdet_fast.ops import _library
from effdet_fast.ops._arguments import (
    IGNORED,
    INTEGERS,
    arithmetic_dtype,
    autocast_dtype,
    check_choice,
    check_floating,
    check_same_device,
    check_tensor,
    dtype_name,
    may_read_values,
    number,
    number_or_scalar,
)
from effdet_fast.ops._layout import dense, in_layout


def sigmoid_focal_loss_reference(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    *,
    label_smoothing: float = 0.0,
    normalizer: float | Tensor | None = None,
    class_weight: Tensor | None = None,
) -> Tensor:
    """Reference for `sigmoid_focal_loss`: any device, differentiable by PyTorch. Half precision is computed in float32."""
    x = inputs.to(arithmetic_dtype(inputs))
    ignored = None
    if targets.is_floating_point():
        t = targets.to(x.dtype)
    else:
        t = (targets.unsqueeze(-1) == torch.arange(x.shape[-1], device=x.device)).to(x.dtype)
        ignored = (targets == IGNORED).unsqueeze(-1)
    y = torch.sigmoid(x) * (1 - t) + torch.sigmoid(-x) * t  # 1 - p_t, without cancellation
    smoothed = t * (1 - label_smoothing) + label_smoothing / 2
    loss = -(1 - smoothed) * F.logsigmoid(-x) - smoothed * F.logsigmoid(x)
    if gamma != 0:
        positive = y > 0  # at y = 0 the limit is 0, of the gradient too
        loss = loss * torch.where(positive, torch.where(positive, y, 1) ** gamma, 0)
    if alpha >= 0:
        loss = loss * (alpha * t + (1 - alpha) * (1 - t))
    if class_weight is not None:
        loss = loss * class_weight.to(x.dtype)
    if ignored is not None:
        loss = loss.masked_fill(ignored, 0)
    if reduction == "none":
        return loss.to(inputs.dtype)
    return _reduced(loss.sum(), reduction, inputs.numel(), normalizer)


def _reduced(total: Tensor, reduction: str, numel: int, normalizer: float | Tensor | None) -> Tensor:
    if reduction == "mean":
        return total / numel  # 0 / 0 = NaN for an empty input, as in PyTorch
    return total if normalizer is None else total / normalizer


_ARGUMENTS = "Tensor inputs, Tensor targets, float alpha, float gamma, float label_smoothing, Tensor? class_weight=None"
_focal_loss = _library.define(
    f"focal_loss({_ARGUMENTS}) -> Tensor", lambda inputs, targets, *options: torch.empty_like(inputs)
)
_focal_loss_sum = _library.define(
    f"focal_loss_sum({_ARGUMENTS}) -> Tensor",
    lambda inputs, targets, *options: inputs.new_empty((), dtype=arithmetic_dtype(inputs)),
)
_focal_loss_backward = _library.define(
    f"focal_loss_backward(Tensor grad, {_ARGUMENTS}) -> Tensor",
    lambda grad, inputs, targets, *options: torch.empty_like(inputs),
)


class _FocalLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, targets, alpha, gamma, label_smoothing, class_weight, summed):
        ctx.save_for_backward(inputs, targets, class_weight)
        ctx.options = (alpha, gamma, label_smoothing)
        ctx.summed = summed
        return (_focal_loss_sum if summed else _focal_loss)(inputs, targets, *ctx.options, class_weight)

    @staticmethod
    def backward(ctx, grad):
        inputs, targets, class_weight = ctx.saved_tensors
        if _library.wants_second_derivative():
            alpha, gamma, smoothing = ctx.options
            reduction = "sum" if ctx.summed else "none"
            options = {"alpha": alpha, "gamma": gamma, "reduction": reduction, "label_smoothing": smoothing}
            reference = partial(sigmoid_focal_loss_reference, targets=targets, class_weight=class_weight, **options)
            return *_library.gradients(reference, [inputs], [True], grad), *(None,) * 6
        if not ctx.summed and grad.stride() != inputs.stride():  # the kernel walks both in one order
            grad = torch.empty_like(inputs).copy_(grad)
        return _focal_loss_backward(grad, inputs, targets, *ctx.options, class_weight), *(None,) * 6


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    *,
    label_smoothing: float = 0.0,
    normalizer: float | Tensor | None = None,
    class_weight: Tensor | None = None,
) -> Tensor:
    """Compute the sigmoid focal loss from integer labels or soft targets, in one pass forward and one backward.

    ``alpha_t * (1 - p_t)**gamma * BCE(x, t_s)`` (Lin et al., Focal Loss for Dense Object Detection, arXiv:1708.02002).

    The first five arguments are those of ``torchvision.ops.sigmoid_focal_loss``. With ``p = sigmoid(x)``:
    ``p_t = p t + (1 - p)(1 - t)``, ``alpha_t = alpha t + (1 - alpha)(1 - t)``; the cross entropy alone sees the smoothed target
    ``t_s = t (1 - s) + s / 2``. ``class_weight`` multiplies the loss of each logit of class c by ``class_weight[c]``, whether c
    is the row's label or not, as the ``weight`` of ``F.binary_cross_entropy_with_logits`` does.

    Args:
        inputs: logits, ``[...]``, or ``[..., C]`` with labels; float16, bfloat16, float32 or float64; any strides (contiguous and
            channels_last are read in place, others are copied). Arithmetic is in float32 (float64 for float64).
        targets: either floating, of the shape and dtype of ``inputs``, with values in [0, 1]; or integer, of shape
            ``inputs.shape[:-1]``: a class in [0, C), -1 for background, -2 for ignored (no loss, no gradient). Labels are never
            turned into a one-hot. No gradient flows to ``targets``.
        alpha: weight of positives, in [0, 1]; -1 switches the weighting off.
        gamma: focusing exponent, >= 0.
        reduction: "none" (shape of ``inputs``), "mean" over all elements, or "sum".
        label_smoothing: s, in [0, 1].
        normalizer: divides a "sum"; a number, or a 0-d tensor on the device of ``inputs`` (no synchronization).
        class_weight: ``[C]``, C the last dimension of ``inputs``; floating, on the device of ``inputs``; used in the dtype of the
            arithmetic. None weighs all classes alike. It does not change what "mean" divides by. No gradient flows to it.

    Returns:
        With "none" a tensor like ``inputs`` (under autocast: float32); reduced losses are float32 (float64 for float64) scalars.
        Deterministic: the same bits in every run and for every thread count.

    Raises:
        TypeError: a dtype is not supported, or floating ``targets`` have another dtype than ``inputs`` outside autocast; a number
            is not one.
        ValueError: shapes or devices do not fit, ``alpha``, ``gamma``, ``label_smoothing`` or ``reduction`` are out of range, or
            a label is >= C or < -2 (looked at on the CPU; on a GPU only after ``effdet_fast.set_debug(True)``).
    """
    op = "sigmoid_focal_loss"
    check_floating(op, "inputs", inputs)
    check_tensor(op, "targets", targets)
    alpha, gamma, label_smoothing = check_focal_options(op, alpha, gamma, label_smoothing)
    normalizer = _check_reduction(op, reduction, normalizer)
    check_same_device(op, "targets", targets, "inputs", inputs)
    if autocast_dtype(inputs) is not None:
        if reduction == "none" and inputs.dtype != torch.float64:
            inputs = inputs.float()
        if targets.is_floating_point() and targets.dtype != inputs.dtype:
            wider = torch.promote_types(inputs.dtype, targets.dtype)
            inputs, targets = inputs.to(wider), targets.to(wider)
    targets = _check_targets(op, inputs, targets)
    if class_weight is not None:
        check_class_weight(op, class_weight, "inputs", inputs, inputs.shape[-1] if inputs.dim() else None)

    look_at_labels = partial(check_label_values, op, targets, inputs.shape[-1] if inputs.dim() else 0)
    native = _library.is_native(inputs)
    if not (native and inputs.is_cpu):
        look_at_labels()
    if not native:
        return sigmoid_focal_loss_reference(
            inputs,
            targets,
            alpha,
            gamma,
            reduction,
            label_smoothing=label_smoothing,
            normalizer=normalizer,
            class_weight=class_weight,
        )
    channels_last = (
        class_weight is None  # which lies along the last dimension
        and inputs.dim() == 4
        and targets.dim() == 4
        and inputs.is_contiguous(memory_format=torch.channels_last)
    )
    if channels_last and not inputs.is_contiguous():
        targets = in_layout(targets, True)
    else:
        inputs, targets = inputs.contiguous(), targets.contiguous()
    if class_weight is not None:
        class_weight = dense(class_weight, arithmetic_dtype(inputs))
    options = (alpha, gamma, label_smoothing, class_weight)
    summed = reduction != "none"
    if torch.is_grad_enabled() and inputs.requires_grad:
        loss = _library.explained(look_at_labels, _FocalLoss.apply, inputs, targets, *options, summed)
    else:
        kernel = _focal_loss_sum if summed else _focal_loss
        loss = _library.explained(look_at_labels, kernel, inputs, targets, *options)
    return _reduced(loss, reduction, inputs.numel(), normalizer) if summed else loss


def check_focal_options(op: str, alpha: float, gamma: float, label_smoothing: float) -> tuple[float, float, float]:
    alpha, gamma = number(op, "alpha", alpha), number(op, "gamma", gamma)
    label_smoothing = number(op, "label_smoothing", label_smoothing)
    if not (0 <= alpha <= 1 or alpha == -1):
        raise ValueError(f"{op}: alpha must be in [0, 1], or -1 for no weighting, got {alpha}")
    if not gamma >= 0:
        raise ValueError(f"{op}: gamma must be >= 0, got {gamma}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1], got {label_smoothing}")
    return alpha, gamma, label_smoothing


def check_class_weight(op: str, class_weight: Tensor, inputs_name: str, inputs: Tensor, classes: int | None) -> None:
    check_floating(op, "class_weight", class_weight)
    check_same_device(op, "class_weight", class_weight, inputs_name, inputs)
    if classes is None or class_weight.shape != (classes,):
        wanted = "None for 0-d inputs" if classes is None else f"of shape [{classes}]"
        raise ValueError(f"{op}: class_weight must be {wanted}, got {list(class_weight.shape)}")
    if class_weight.requires_grad:
        raise ValueError(f"{op}: class_weight must not require a gradient, got a tensor with requires_grad=True")


def _check_reduction(op: str, reduction: str, normalizer: float | Tensor | None) -> float | Tensor | None:
    check_choice(op, "reduction", reduction, ("none", "mean", "sum"))
    if normalizer is None:
        return None
    if reduction != "sum":
        raise ValueError(f"{op}: normalizer needs reduction='sum', got reduction={reduction!r}")
    return number_or_scalar(op, "normalizer", normalizer)


def _check_targets(op: str, inputs: Tensor, targets: Tensor) -> Tensor:
    if targets.is_floating_point():
        if targets.shape != inputs.shape:
            raise ValueError(_shape_message(op, inputs, targets))
        if targets.dtype != inputs.dtype:
            expected, got = dtype_name(inputs.dtype), dtype_name(targets.dtype)
            raise TypeError(f"{op}: floating targets must have the dtype of inputs, {expected}, got {got}")
        if targets.requires_grad:
            raise ValueError(f"{op}: targets must not require a gradient, got a tensor with requires_grad=True")
        return targets
    if targets.dtype not in INTEGERS:
        raise TypeError(f"{op}: targets must be floating or integer, got {dtype_name(targets.dtype)}")
    if inputs.dim() == 0 or targets.shape != inputs.shape[:-1]:
        raise ValueError(_shape_message(op, inputs, targets))
    return targets if targets.dtype == torch.int64 else targets.long()


def check_label_values(op: str, labels: Tensor, classes: int) -> None:
    """Raises ValueError for a label that is neither a class nor background nor ignored, where values may be looked at.

    Kernels look at labels on the CPU themselves, at a fraction of the price.
    """
    if not labels.is_floating_point() and may_read_values(labels) and labels.numel():
        lowest, highest = torch.aminmax(labels)
        if lowest.item() < IGNORED or highest.item() >= classes:  # comparing tensors costs ten times as much
            first = labels[(labels < IGNORED) | (labels >= classes)].flatten()[0].item()
            raise ValueError(
                f"{op}: labels must be a class in [0, {classes}), -1 (background) or -2 (ignored), got {first}"
            )


def _shape_message(op: str, inputs: Tensor, targets: Tensor) -> str:
    labels = f"{list(inputs.shape[:-1])} (labels) or " if inputs.dim() else ""
    return f"{op}: targets must have shape {labels}{list(inputs.shape)}, got {list(targets.shape)}"
