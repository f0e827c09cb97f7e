"""Squeeze-and-excite: each channel of each image times a gate computed from the image's channel means."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from effdet_fast._choices import ACTIVATION_FUNCTIONS, ACTIVATION_NAMES, ACTIVATIONS
from effdet_fast.ops import _library
from effdet_fast.ops._arguments import (
    arithmetic_dtype,
    autocast_dtype,
    check_choice,
    check_floating,
    check_same_device,
    dtype_name,
    is_like,
)
from effdet_fast.ops._layout import dense_like, in_layout, is_channels_last

# Of the reduction and of the expansion: weight and bias.
Weights = tuple[Tensor, Tensor | None, Tensor, Tensor | None]

_OP = "squeeze_excite"


def squeeze_excite_reference(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    *,
    activation: str = "silu",
) -> Tensor:
    """Reference for `squeeze_excite`, differentiable by PyTorch. Half precision is computed in float32."""
    dtype = arithmetic_dtype(x)
    reduce_weight, reduce_bias, expand_weight, expand_bias = _to(
        dtype, reduce_weight, reduce_bias, expand_weight, expand_bias
    )
    wide = x.to(dtype)
    with _outside_autocast(x):
        reduced = F.linear(wide.mean((2, 3)), _matrix(reduce_weight), reduce_bias)
        gate = F.linear(ACTIVATION_FUNCTIONS[activation](reduced), _matrix(expand_weight), expand_bias)
    return (wide * gate.sigmoid()[:, :, None, None]).to(x.dtype)


def _to(dtype, *weights) -> Weights:
    # One that fits is asked nothing more: this runs in every call.
    reduce_weight, reduce_bias, expand_weight, expand_bias = [
        t if t is None or (t.dtype == dtype and t.is_contiguous()) else t.to(dtype).contiguous() for t in weights
    ]
    return reduce_weight, reduce_bias, expand_weight, expand_bias


def _matrix(weight: Tensor) -> Tensor:
    """[R, C, 1, 1] as [R, C], so that the gradient gets the strides of the weight also where a size is 1: DDP compares them."""
    return weight.permute(0, 2, 3, 1).flatten(0, 2) if is_channels_last(weight) else weight.flatten(1)


def _outside_autocast(x: Tensor):
    """The means are few: their matrix products stay in the dtype of the arithmetic."""
    return nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)


# x and its gradients are dense in the layout that `channels_last` says; the rest is contiguous, in the dtype of the arithmetic.
def _forward_fake(x, reduce_weight, reduce_bias, expand_weight, expand_bias, activation, channels_last):
    kept = 2 * x.shape[0] * (x.shape[1] + reduce_weight.shape[0])
    return dense_like(x, channels_last), x.new_empty((kept,), dtype=arithmetic_dtype(x))


def _backward_fake(grad, x, reduce_weight, expand_weight, kept, activation, channels_last, needs):
    biases = [weight.new_empty((weight.shape[0],)) for weight in (reduce_weight, expand_weight)]
    every = [dense_like(x, channels_last), reduce_weight, biases[0], expand_weight, biases[1]]
    return [torch.empty_like(t) for t, need in zip(every, needs, strict=True) if need]


# Returns, after the result, what the backward needs: means, gates before the sigmoid, reduced before and after the activation.
_forward = _library.define(
    "squeeze_excite(Tensor x, Tensor reduce_weight, Tensor? reduce_bias, Tensor expand_weight, Tensor? expand_bias, "
    "int activation, bool channels_last) -> (Tensor, Tensor)",
    _forward_fake,
)
# `needs`: of x, reduce_weight, reduce_bias, expand_weight, expand_bias.
_backward = _library.define(
    "squeeze_excite_backward(Tensor grad, Tensor x, Tensor reduce_weight, Tensor expand_weight, Tensor kept, int activation, "
    "bool channels_last, bool[] needs) -> Tensor[]",
    _backward_fake,
)


class _SqueezeExcite(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, reduce_weight, reduce_bias, expand_weight, expand_bias, activation, channels_last):
        weights = (reduce_weight, reduce_bias, expand_weight, expand_bias)
        y, kept = _forward(x, *weights, ACTIVATIONS[activation], channels_last)
        ctx.save_for_backward(x, *weights, kept)
        ctx.activation, ctx.channels_last = activation, channels_last
        return y

    @staticmethod
    def backward(ctx, grad):
        x, reduce_weight, reduce_bias, expand_weight, expand_bias, kept = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:5])
        if _library.wants_second_derivative():
            every = (x, reduce_weight, reduce_bias, expand_weight, expand_bias)
            reference = partial(squeeze_excite_reference, activation=ctx.activation)
            return *_library.gradients(reference, every, needs, grad), None, None
        channels_last = ctx.channels_last
        grad, number = in_layout(grad, channels_last), ACTIVATIONS[ctx.activation]
        grads = iter(_backward(grad, x, reduce_weight, expand_weight, kept, number, channels_last, needs))
        return *[next(grads) if need else None for need in needs], None, None


def squeeze_excite(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    *,
    activation: str = "silu",
) -> Tensor:
    """Scale each channel by a gate that is computed from the means of all channels.

    ``x * sigmoid(conv_expand(activation(conv_reduce(mean of x over H and W))))`` with 1 x 1 convolutions.

    Forward reads ``x`` twice and writes the result; backward reads ``x`` once and the gradient twice and writes one. Only ``x``
    and what belongs to a channel is kept for it.

    Args:
        x: ``[N, C, H, W]``; float16, bfloat16, float32 or float64; any strides. Contiguous and channels_last are read in
            place, and the output has the same memory format. Means and gates are computed in float32 (float64 for float64).
        reduce_weight: ``[R, C, 1, 1]``.
        reduce_bias: ``[R]``, or None.
        expand_weight: ``[C, R, 1, 1]``.
        expand_bias: ``[C]``, or None. All four have the dtype of ``x`` or, for half precision, float32.
        activation: "silu", "relu" or "relu6", between the two.

    Returns:
        A tensor like ``x``. Under autocast ``x`` is converted to, and the result returned in, the autocast dtype. Gradients flow
        to ``x`` and to the weights and biases. Deterministic: the same bits in every run and for every thread count.

    Raises:
        TypeError: a dtype is not supported, or does not fit that of ``x`` outside autocast.
        ValueError: a shape or device does not fit, or the activation is unknown.

    Source: Hu et al., Squeeze-and-Excitation Networks (arXiv:1709.01507).
    """
    check_floating(_OP, "x", x)
    if x.dim() != 4 or x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"{_OP}: x must have shape [N, C, H, W] with at least one pixel, got {list(x.shape)}")
    check_choice(_OP, "activation", activation, ACTIVATION_NAMES)
    weights = (reduce_weight, reduce_bias, expand_weight, expand_bias)
    dtype = autocast_dtype(x)
    _check_weights(x, *weights, any_dtype=dtype is not None)
    if dtype is not None and x.dtype != torch.float64:
        x = x.to(dtype)
    if not _library.is_native(x) or reduce_weight.shape[0] == 0:
        return squeeze_excite_reference(x, *weights, activation=activation)
    channels_last = is_channels_last(x)
    x, weights = in_layout(x, channels_last), _to(arithmetic_dtype(x), *weights)
    if torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in (x, *weights)]):
        return _SqueezeExcite.apply(x, *weights, activation, channels_last)
    return _forward(x, *weights, ACTIVATIONS[activation], channels_last)[0]


def _check_weights(x: Tensor, reduce_weight, reduce_bias, expand_weight, expand_bias, any_dtype: bool) -> None:
    check_floating(_OP, "reduce_weight", reduce_weight)
    channels, squeezed = x.shape[1], reduce_weight.shape[0] if reduce_weight.dim() else 0
    dtype, device = x.dtype, x.device
    expected = (
        ("reduce_weight", reduce_weight, (squeezed, channels, 1, 1)),
        ("reduce_bias", reduce_bias, (squeezed,)),
        ("expand_weight", expand_weight, (channels, squeezed, 1, 1)),
        ("expand_bias", expand_bias, (channels,)),
    )
    for name, values, shape in expected:
        if is_like(values, shape, dtype, device) or (values is None and name.endswith("bias")):
            continue
        check_floating(_OP, name, values)
        check_same_device(_OP, name, values, "x", x)
        if not any_dtype and values.dtype != x.dtype and values.dtype != arithmetic_dtype(x):
            wanted = " or ".join(dict.fromkeys((dtype_name(x.dtype), dtype_name(arithmetic_dtype(x)))))
            raise TypeError(f"{_OP}: {name} must have dtype {wanted} for this x, got {dtype_name(values.dtype)}")
        if values.shape != shape:
            wanted = "[R, " + str(list(shape))[1:].partition(", ")[2] if name == "reduce_weight" else str(list(shape))
            raise ValueError(f"{_OP}: {name} must have shape {wanted}, got {list(values.shape)}")
