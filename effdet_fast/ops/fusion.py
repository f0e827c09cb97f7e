"""Weighted feature fusion of a BiFPN node (Tan et al., "EfficientDet", 2020): resampling, weights, sum, activation in one."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from effdet_fast._choices import ACTIVATION_FUNCTIONS, ACTIVATIONS, FUSION_METHODS, MAX_FUSION_INPUTS, RESAMPLES
from effdet_fast.ops import _library
from effdet_fast.ops._arguments import (
    arithmetic_dtype,
    autocast_dtype,
    check_choice,
    check_floating,
    check_same_device,
    dtype_name,
    number,
    plain_integer,
    remembered,
)
from effdet_fast.ops._layout import dense, empty_in_layout, in_layout, is_channels_last


def weighted_fusion_reference(
    inputs: Sequence[Tensor],
    weights: Tensor | None = None,
    *,
    method: str = "fast",
    resample: Sequence[str] | None = None,
    size: tuple[int, int] | None = None,
    activation: str | None = None,
    eps: float = 1e-4,
) -> Tensor:
    """Reference for `weighted_fusion`: any device, differentiable by PyTorch. Half precision is computed in float32."""
    resample = ["none"] * len(inputs) if resample is None else list(resample)
    size = None if size is None else (size[0], size[1])
    size = _output_size("weighted_fusion_reference", [x.shape for x in inputs], resample, size)
    dtype = arithmetic_dtype(inputs[0])
    normalized = None if weights is None else _normalized(weights.to(dtype), method, eps)
    total: Tensor | None = None
    for i, (x, how) in enumerate(zip(inputs, resample, strict=True)):
        term = _resampled(x.to(dtype), how, size)
        if normalized is not None:
            term = term * normalized[i]
        total = term if total is None else total + term
    assert total is not None
    total = ACTIVATION_FUNCTIONS[activation](total)
    return in_layout(total.to(inputs[0].dtype), is_channels_last(inputs[0]))


def _normalized(weights: Tensor, method: str, eps: float) -> Tensor:
    if method == "softmax":
        return torch.softmax(weights, 0)
    positive = F.relu(weights)
    return positive / (positive.sum() + eps)


def _resampled(x: Tensor, how: str, size: tuple[int, int]) -> Tensor:
    if how == "none":
        return x
    if how == "nearest":
        for axis in (2, 3):
            n_out, n_in = size[axis - 2], x.shape[axis]
            x = x.index_select(axis, torch.arange(n_out, device=x.device) * n_in // max(n_out, 1))
        return x
    return x[:, :, ::2, ::2] if x.numel() == 0 else same_max_pool2d(x)


def same_max_pool2d(x: Tensor) -> Tensor:
    """Max-pool 3x3 of stride 2, padded as TensorFlow's SAME does: sides are halved and rounded up."""
    # SAME adds one row or column before an odd size, none before an even one; ceil_mode supplies the one after.
    return F.max_pool2d(x, 3, 2, padding=(x.shape[2] % 2, x.shape[3] % 2), ceil_mode=True)


def _fusion_fake(inputs, weights, method, eps, resample, h, w, activation, channels_last):
    x = inputs[0]
    return empty_in_layout(x, (x.shape[0], x.shape[1], h, w), channels_last)


def _fusion_train_fake(inputs, weights, method, eps, resample, h, w, activation, channels_last):
    out = _fusion_fake(inputs, weights, method, eps, resample, h, w, activation, channels_last)
    pooled = [dtype for how in resample if how == RESAMPLES["max_pool"] for dtype in (out.dtype, torch.uint8)]
    return [out, *(torch.empty_like(out, dtype=dtype) for dtype in pooled)]


def _fusion_backward_fake(grad, inputs, kept, weights, method, eps, resample, activation, channels_last, needs):
    wanted = [x for x, need in zip(inputs, needs, strict=False) if need]
    return [torch.empty_like(x) for x in (wanted + [weights] if needs[-1] else wanted)]


_fusion_forward = _library.define(
    "fusion(Tensor[] inputs, Tensor? weights, int method, float eps, int[] resample, SymInt h, SymInt w, int activation, "
    "bool channels_last) -> Tensor",
    _fusion_fake,
)
# Keeps for the backward, after the output, the maxima of each max_pool input and which tap of its window each is.
_fusion_train = _library.define(
    "fusion_train(Tensor[] inputs, Tensor? weights, int method, float eps, int[] resample, SymInt h, SymInt w, int activation, "
    "bool channels_last) -> Tensor[]",
    _fusion_train_fake,
)
_fusion_backward = _library.define(
    "fusion_backward(Tensor grad, Tensor[] inputs, Tensor[] kept, Tensor? weights, int method, float eps, int[] resample, "
    "int activation, bool channels_last, bool[] needs) -> Tensor[]",
    _fusion_backward_fake,
)


class _Fusion(torch.autograd.Function):
    @staticmethod
    def forward(ctx, options, arguments, weights, *inputs):
        if RESAMPLES["max_pool"] in options[2]:
            out, *kept = _fusion_train(inputs, weights, *options)
        else:
            out, kept = _fusion_forward(inputs, weights, *options), []
        ctx.save_for_backward(weights, *inputs, *kept)
        ctx.options = options
        ctx.arguments = arguments
        return out

    @staticmethod
    def backward(ctx, grad):
        weights, *saved = ctx.saved_tensors
        count = len(ctx.needs_input_grad) - 3
        inputs, kept = saved[:count], saved[count:]
        method, eps, resample, h, w, activation, channels_last = ctx.options
        needs = [*ctx.needs_input_grad[3:], ctx.needs_input_grad[2]]
        if _library.wants_second_derivative():
            reference = lambda *every: weighted_fusion_reference(every[:-1], every[-1], **ctx.arguments)  # noqa: E731
            found = _library.gradients(reference, [*inputs, weights], needs, grad)
        else:
            grad = in_layout(grad, channels_last)
            options = (method, eps, resample, activation, channels_last)
            grads = iter(_fusion_backward(grad, inputs, kept, weights, *options, needs))
            found = [next(grads) if need else None for need in needs]
        *grad_inputs, grad_weights = found
        return None, None, grad_weights, *grad_inputs


def weighted_fusion(
    inputs: Sequence[Tensor],
    weights: Tensor | None = None,
    *,
    method: str = "fast",
    resample: Sequence[str] | None = None,
    size: tuple[int, int] | None = None,
    activation: str | None = None,
    eps: float = 1e-4,
) -> Tensor:
    """Fuse pyramid features of different sizes by learned weights, in one pass.

    ``activation(sum_i w_i * resample_i(x_i))`` (Tan, Pang and Le, EfficientDet, arXiv:1911.09070, section 3.3).

    The ``w_i`` are normalized in float32 (float64 for float64 inputs): "fast" is ``relu(w_i) / (sum_j relu(w_j) + eps)``,
    "softmax" is ``softmax(w)_i``, "sum" takes 1 for each. effdet calls them "fastattn", "attn" and "sum".

    Args:
        inputs: 2 to 4 tensors ``[N, C, H_i, W_i]`` of one dtype (float16, bfloat16, float32, float64; under autocast mixed dtypes
            are promoted to the widest); NCHW and channels_last are read in place, other strides are copied. The layout of the
            first input is that of the result; inputs in another one are copied. Arithmetic is in float32 (float64 for float64).
        weights: ``[len(inputs)]``, floating, not normalized; None for method "sum", which has none.
        method: "fast", "softmax" or "sum".
        resample: for each input how it is brought to ``size``: "none"; "nearest", which reads index ``floor(i * H_i / H)``
            (exact integers, any ratio); or "max_pool", of kernel 3 and stride 2 with TensorFlow's SAME padding (-inf; one row or
            column after an even size, one on each side of an odd one), which halves the size rounding up. Default: "none" for
            all. The maximum and its gradient are PyTorch's: NaN propagates, of equal values the first in the window counts.
        size: ``(H, W)`` of the result. Default: that of the inputs with "none", or of those with "max_pool" after pooling.
        activation: None, "silu", "relu" or "relu6", applied to the sum.
        eps: added to the sum of the weights by "fast", >= 0.

    Returns:
        ``[N, C, H, W]`` of the inputs' dtype. Gradients flow to all inputs and to ``weights``. Deterministic: the same bits in
        every run and for every thread count.

    Raises:
        TypeError: an argument has the wrong type, or dtypes are not supported or differ outside autocast.
        ValueError: numbers of inputs, shapes, sizes or devices do not fit, or an option is unknown.
    """
    return _fusion("weighted_fusion", inputs, weights, method, resample, size, activation, eps)


def fast_normalized_fusion_reference(
    inputs: Sequence[Tensor],
    weights: Tensor,
    *,
    eps: float = 1e-4,
    resample: Sequence[str] | None = None,
    size: tuple[int, int] | None = None,
    activation: str | None = None,
) -> Tensor:
    """`weighted_fusion_reference` with method "fast"."""
    return weighted_fusion_reference(inputs, weights, eps=eps, resample=resample, size=size, activation=activation)


def fast_normalized_fusion(
    inputs: Sequence[Tensor],
    weights: Tensor,
    *,
    eps: float = 1e-4,
    resample: Sequence[str] | None = None,
    size: tuple[int, int] | None = None,
    activation: str | None = None,
) -> Tensor:
    """`weighted_fusion` with method "fast": weights ``relu(w_i) / (sum_j relu(w_j) + eps)``."""
    return _fusion("fast_normalized_fusion", inputs, weights, "fast", resample, size, activation, eps)


def _fusion(op, inputs, weights, method, resample, size, activation, eps) -> Tensor:
    check_choice(op, "method", method, FUSION_METHODS)
    check_choice(op, "activation", activation, ACTIVATIONS)
    eps = number(op, "eps", eps)
    if not eps >= 0:
        raise ValueError(f"{op}: eps must be >= 0, got {eps}")
    inputs = _check_inputs(op, inputs)
    resample = _check_resample(op, len(inputs), resample)
    size = _output_size_once(op, tuple([x.shape for x in inputs]), resample, _check_size(op, size))
    _check_weights(op, inputs, weights, method)
    arguments = {"method": method, "resample": resample, "size": size, "activation": activation, "eps": eps}
    first = inputs[0]
    if not _library.is_native(first):
        return weighted_fusion_reference(inputs, weights, **arguments)

    channels_last = is_channels_last(first)
    inputs = [in_layout(x, channels_last) for x in inputs]
    if weights is not None:
        weights = dense(weights, arithmetic_dtype(first))
    numbers = [RESAMPLES[how] for how in resample]
    options = (FUSION_METHODS[method], eps, numbers, size[0], size[1], ACTIVATIONS[activation], channels_last)
    needs_gradient = any([x.requires_grad for x in inputs]) or (weights is not None and weights.requires_grad)
    if needs_gradient and torch.is_grad_enabled():
        if torch.compiler.is_compiling():  # which wants each tensor once
            inputs = [x.view_as(x) if any(x is other for other in inputs[:i]) else x for i, x in enumerate(inputs)]
        return _Fusion.apply(options, arguments, weights, *inputs)
    return _fusion_forward(inputs, weights, *options)


def _check_inputs(op: str, inputs: Sequence[Tensor]) -> list[Tensor]:
    if not isinstance(inputs, (list, tuple)):
        raise TypeError(f"{op}: inputs must be a list or tuple of tensors, got {type(inputs).__name__}")
    if not 2 <= len(inputs) <= MAX_FUSION_INPUTS:
        raise ValueError(f"{op}: inputs must be 2 to {MAX_FUSION_INPUTS} tensors, got {len(inputs)}")
    first, is_mixed = inputs[0], False
    for i, x in enumerate(inputs):
        check_floating(op, f"inputs[{i}]", x)
        shape = x.shape
        if len(shape) != 4:
            raise ValueError(f"{op}: inputs[{i}] must have shape [N, C, H, W], got {list(shape)}")
        if i == 0:
            n, c = shape[0], shape[1]
            continue
        check_same_device(op, f"inputs[{i}]", x, "inputs[0]", first)
        if shape[0] != n or shape[1] != c:
            raise ValueError(f"{op}: inputs[{i}] must have shape [{n}, {c}, H, W] as inputs[0], got {list(shape)}")
        is_mixed = is_mixed or x.dtype != first.dtype
    if is_mixed:
        if autocast_dtype(first) is None:
            names = ", ".join(dtype_name(x.dtype) for x in inputs)
            raise TypeError(f"{op}: inputs must have one dtype outside autocast, got {names}")
        widest = first.dtype
        for x in inputs:
            widest = torch.promote_types(widest, x.dtype)
        return [x.to(widest) for x in inputs]
    return list(inputs)


def _check_resample(op: str, count: int, resample: Sequence[str] | None) -> tuple[str, ...]:
    if resample is None:
        return ("none",) * count
    if not isinstance(resample, list | tuple):
        raise TypeError(f"{op}: resample must be a list or tuple of strings, got {type(resample).__name__}")
    if len(resample) != count:
        raise ValueError(f"{op}: resample must have one entry for each of the {count} inputs, got {len(resample)}")
    for i, how in enumerate(resample):
        check_choice(op, f"resample[{i}]", how, RESAMPLES)
    return tuple(resample)


def _check_size(op: str, size) -> tuple[int, int] | None:
    if size is None:
        return None
    height, width = map(plain_integer, size) if isinstance(size, list | tuple) and len(size) == 2 else (None, None)
    if height is None or width is None:
        raise TypeError(f"{op}: size must be a pair (height, width), got {size!r}")
    if height < 0 or width < 0:
        raise ValueError(f"{op}: size must not be negative, got {(height, width)}")
    return height, width


def _output_size(op: str, shapes, resample: Sequence[str], size: tuple[int, int] | None) -> tuple[int, int]:
    for i, (shape, how) in enumerate(zip(shapes, resample, strict=True)):
        if how == "nearest":
            continue
        height, width = shape[2], shape[3]
        if how == "max_pool":
            height, width = (height + 1) // 2, (width + 1) // 2
        if size is None:
            size = (height, width)
        elif (height, width) != size:
            gives = f"{list(shape)} is {(height, width)}" + (" after max_pool" if how == "max_pool" else "")
            raise ValueError(f"{op}: inputs[{i}] must fit the size {size}, got {gives}")
    if size is None:
        raise ValueError(f"{op}: size must be given when every input has resample 'nearest', got None")
    for i, (shape, how) in enumerate(zip(shapes, resample, strict=True)):
        if how == "nearest" and (shape[2] < min(size[0], 1) or shape[3] < min(size[1], 1)):
            raise ValueError(f"{op}: inputs[{i}] must not be empty to be resampled to {size}, got {list(shape)}")
    return size


_output_size_once = remembered(_output_size)


def _check_weights(op: str, inputs: Sequence[Tensor], weights: Tensor | None, method: str) -> None:
    if method == "sum":
        if weights is not None:
            raise ValueError(f"{op}: weights must be None with method='sum', got {type(weights).__name__}")
        return
    check_floating(op, "weights", weights)
    assert weights is not None
    check_same_device(op, "weights", weights, "inputs", inputs[0])
    if weights.dim() != 1 or weights.shape[0] != len(inputs):
        raise ValueError(f"{op}: weights must have shape [{len(inputs)}], got {list(weights.shape)}")
