"""Depthwise convolution (one k x k filter per channel), and the depthwise-separable convolution built on it."""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from effdet_fast._choices import ACTIVATION_FUNCTIONS, ACTIVATIONS
from effdet_fast.ops import _library
from effdet_fast.ops._arguments import (
    TOO_LARGE,
    autocast_dtype,
    check_choice,
    check_floating,
    check_same_device,
    dtype_name,
    plain_integer,
    remembered,
)
from effdet_fast.ops._layout import empty_in_layout, in_layout, is_channels_last, with_strides_of

HALF = (torch.float16, torch.bfloat16)
Padding = int | str | tuple[int, int] | tuple[int, int, int, int]


class Geometry(NamedTuple):
    """A convolution's checked numbers; pairs are (vertical, horizontal), sides (left, right, top, bottom)."""

    stride: tuple[int, int]
    dilation: tuple[int, int]
    sides: tuple[int, int, int, int]
    size: tuple[int, int]  # of the output
    has_kernel: bool  # one of our own


def depthwise_conv2d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: Padding = 0,
    dilation: int | tuple[int, int] = 1,
    *,
    prologue: str | None = None,
) -> Tensor:
    """Reference for `depthwise_conv2d`: activation, padding and ``F.conv2d`` one after the other."""
    geometry = _geometry("depthwise_conv2d", x, weight, stride, padding, dilation)
    return _pytorch(x, weight, bias, geometry, prologue)


def _pytorch(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, prologue: str | None) -> Tensor:
    left, right, top, bottom = geometry.sides
    x = ACTIVATION_FUNCTIONS[prologue](x)
    if x.shape[1] == 0:  # PyTorch knows no convolution without channels
        nothing = x.sum() + weight.sum() + (0 if bias is None else bias.sum())
        return nothing * x.new_zeros(x.shape[0], 0, *geometry.size)
    symmetric = left == right and top == bottom
    if not symmetric:
        x = F.pad(x, geometry.sides)
    pads = (top, left) if symmetric else (0, 0)
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    return F.conv2d(x, weight, bias, geometry.stride, pads, geometry.dilation, groups=x.shape[1])


_GEOMETRY = "int stride, SymInt left, SymInt top"
_depthwise_conv = _library.define(
    f"depthwise_conv(Tensor x, Tensor weight, Tensor? bias, {_GEOMETRY}, SymInt out_height, SymInt out_width, int prologue, "
    "bool channels_last) -> Tensor",
    lambda x, weight, bias, stride, left, top, out_height, out_width, prologue, channels_last: empty_in_layout(
        x, (x.shape[0], x.shape[1], out_height, out_width), channels_last
    ),
)
_depthwise_conv_grad_input = _library.define(
    f"depthwise_conv_grad_input(Tensor grad, Tensor x, Tensor weight, {_GEOMETRY}, int prologue, bool channels_last) -> Tensor",
    lambda grad, x, weight, stride, left, top, prologue, channels_last: empty_in_layout(x, x.shape, channels_last),
)
_depthwise_conv_grad_weight = _library.define(
    f"depthwise_conv_grad_weight(Tensor grad, Tensor x, int kernel, {_GEOMETRY}, int prologue, bool channels_last, "
    "bool with_bias, bool in_float32) -> (Tensor, Tensor)",
    lambda grad, x, kernel, stride, left, top, prologue, channels_last, with_bias, in_float32: empty_filters(
        x, x.shape[1], kernel, with_bias, in_float32
    ),
)


def empty_filters(x: Tensor, channels: int, kernel: int, with_bias: bool, in_float32: bool) -> tuple[Tensor, Tensor]:
    """What a filter and a bias, or their gradients, look like; empty without a bias."""
    dtype = torch.float32 if in_float32 else x.dtype
    shapes = (channels, 1, kernel, kernel), (channels if with_bias else 0,)
    return x.new_empty(shapes[0], dtype=dtype), x.new_empty(shapes[1], dtype=dtype)


class _DepthwiseConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, geometry, prologue, channels_last):
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.prologue, ctx.channels_last = geometry, prologue, channels_last
        return _forward(x, weight, bias, geometry, prologue, channels_last)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        if _library.wants_second_derivative():
            # The bias is not kept: its gradient needs no value of it.
            bias = weight.new_zeros(weight.shape[0], requires_grad=True) if need_bias else None
            reference = partial(_pytorch, geometry=ctx.geometry, prologue=ctx.prologue)
            needs = (need_x, need_weight, need_bias)
            return *_library.gradients(reference, (x, weight, bias), needs, grad), None, None, None
        left, _, top, _ = ctx.geometry.sides
        options = (ctx.geometry.stride[0], left, top, ACTIVATIONS[ctx.prologue], ctx.channels_last)
        grad = in_layout(grad, ctx.channels_last)
        grad_x = grad_weight = grad_bias = None
        if need_x:
            grad_x = _depthwise_conv_grad_input(grad, x, weight, *options)
        if need_weight or need_bias:
            in_float32 = weight.dtype != x.dtype
            grad_weight, grad_bias = _depthwise_conv_grad_weight(
                grad, x, weight.shape[2], *options, need_bias, in_float32
            )
            grad_weight = with_strides_of(weight, grad_weight)
        return grad_x, grad_weight if need_weight else None, grad_bias if need_bias else None, None, None, None


def _forward(x, weight, bias, geometry: Geometry, prologue: str | None, channels_last: bool) -> Tensor:
    left, _, top, _ = geometry.sides
    stride, size = geometry.stride[0], geometry.size
    return _depthwise_conv(x, weight, bias, stride, left, top, *size, ACTIVATIONS[prologue], channels_last)


def _native(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, prologue: str | None) -> Tensor:
    channels_last = is_channels_last(x)
    x = in_layout(x, channels_last)
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    needs_gradient = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    run = _DepthwiseConv.apply if needs_gradient and torch.is_grad_enabled() else _forward
    return run(x, weight, bias, geometry, prologue, channels_last)


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: Padding = 0,
    dilation: int | tuple[int, int] = 1,
    *,
    prologue: str | None = None,
) -> Tensor:
    """Convolve each channel with a filter of its own, without a copy for padding or the activation before it.

    ``F.conv2d(prologue(x), weight, bias, stride, padding, dilation, groups=C)`` (Howard et al., MobileNets, arXiv:1704.04861).

    Filters of 3 x 3 and 5 x 5 with stride 1 or 2 and dilation 1 run on kernels of our own; everything else (other sizes,
    dilation, a channel multiplier) gives the same result through PyTorch.

    Args:
        x: ``[N, C, H, W]``; float16, bfloat16, float32 or float64; any strides. Contiguous and channels_last are read in
            place, and the output has the same memory format.
        weight: ``[C, 1, k, k]`` (``[C * m, 1, kh, kw]`` with a channel multiplier m), of the dtype of ``x``.
        bias: ``[C]`` (``[C * m]``), or None.
        stride: one number or (vertical, horizontal).
        padding: zeros around the input: one number, (vertical, horizontal), (left, right, top, bottom), or "same": output
            size ``ceil(size / stride)``, where an odd amount puts the extra zeros right and below, as TensorFlow does.
        dilation: one number or (vertical, horizontal).
        prologue: None, "silu", "relu" or "relu6", applied to each input element before padding (a padded zero stays zero).
            It is recomputed in the backward pass: only ``x`` and ``weight`` are kept.

    Returns:
        ``[N, C, OH, OW]`` (``[N, C * m, OH, OW]``). Accumulated in float32 (float64 for float64). Under autocast it is computed
        in, and returned in, the autocast dtype; a float32 ``weight`` is rounded as it is read, and its gradient is not
        rounded. Gradients flow to ``x``, ``weight`` and ``bias``; forward and backward are deterministic: the same bits in
        every run and for every thread count.

    Raises:
        TypeError: a dtype is not supported, or differs between the tensors outside autocast; a number is not an integer.
        ValueError: shapes, devices or numbers do not fit, or the padded input is smaller than the filter.
    """
    op = "depthwise_conv2d"
    check_floating(op, "x", x)
    check_floating(op, "weight", weight)
    geometry = _geometry(op, x, weight, stride, padding, dilation)
    _check_operand(op, "weight", weight, x)
    if bias is not None:
        check_floating(op, "bias", bias)
        _check_operand(op, "bias", bias, x)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{op}: bias must have shape {list(weight.shape[:1])}, got {list(bias.shape)}")
    check_choice(op, "prologue", prologue, ACTIVATIONS)
    dtype = autocast_dtype(x)
    if dtype is not None:
        x = _autocast(x, dtype)
        weight, bias = _autocast_filter(x, weight, bias)
    run = _native if geometry.has_kernel and _library.is_native(x) else _pytorch
    return run(x, weight, bias, geometry, prologue)


def depthwise_separable_conv2d_reference(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: Padding = 0,
    dilation: int | tuple[int, int] = 1,
    *,
    prologue: str | None = None,
    activation: str | None = None,
) -> Tensor:
    """Reference for `depthwise_separable_conv2d`."""
    y = depthwise_conv2d_reference(x, depthwise_weight, None, stride, padding, dilation, prologue=prologue)
    return ACTIVATION_FUNCTIONS[activation](F.conv2d(y, pointwise_weight, bias))


def depthwise_separable_conv2d(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: Padding = 0,
    dilation: int | tuple[int, int] = 1,
    *,
    prologue: str | None = None,
    activation: str | None = None,
) -> Tensor:
    """Convolve each channel with a filter of its own, then mix the channels by a 1 x 1 convolution.

    ``activation(pointwise(depthwise_conv2d(x)) + bias)``.

    The pointwise part is a matrix product through PyTorch's library. Dtypes, layouts and errors are those of
    `depthwise_conv2d`.

    Args:
        x: ``[N, C, H, W]``.
        depthwise_weight: ``[C, 1, k, k]``.
        pointwise_weight: ``[O, C, 1, 1]``.
        bias: ``[O]``, added to the output of the pointwise part; or None.
        stride: as in `depthwise_conv2d`.
        padding: as in `depthwise_conv2d`.
        dilation: as in `depthwise_conv2d`.
        prologue: activation of the input, as in `depthwise_conv2d`.
        activation: activation of the output: None, "silu", "relu" or "relu6".

    Returns:
        ``[N, O, OH, OW]``.
    """
    op = "depthwise_separable_conv2d"
    check_choice(op, "activation", activation, ACTIVATIONS)
    check_floating(op, "pointwise_weight", pointwise_weight)
    y = depthwise_conv2d(x, depthwise_weight, None, stride, padding, dilation, prologue=prologue)
    _check_operand(op, "pointwise_weight", pointwise_weight, x)
    if pointwise_weight.dim() != 4 or pointwise_weight.shape[1:] != (y.shape[1], 1, 1):
        got = list(pointwise_weight.shape)
        raise ValueError(f"{op}: pointwise_weight must have shape [O, {y.shape[1]}, 1, 1], got {got}")
    if bias is not None:
        check_floating(op, "bias", bias)
        _check_operand(op, "bias", bias, x)
        if bias.shape != pointwise_weight.shape[:1]:
            raise ValueError(f"{op}: bias must have shape {list(pointwise_weight.shape[:1])}, got {list(bias.shape)}")
    return ACTIVATION_FUNCTIONS[activation](F.conv2d(y, pointwise_weight, bias))


def _check_operand(op: str, name: str, operand: Tensor, x: Tensor, x_name: str = "x") -> None:
    check_same_device(op, name, operand, x_name, x)
    if operand.dtype != x.dtype and autocast_dtype(x) is None:
        wanted = f"the dtype of {x_name}, {dtype_name(x.dtype)}"
        raise TypeError(f"{op}: {name} must have {wanted}, got {dtype_name(operand.dtype)}")


def _autocast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(dtype)


def _autocast_filter(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """For an `x` of autocast's dtype, beside which kernels read float32 as it is."""
    dtype = torch.float32 if weight.dtype == torch.float32 and x.dtype in HALF else x.dtype
    weight = weight.to(dtype)
    return weight, None if bias is None else bias.to(dtype)


def _pair(op: str, name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    if type(value) is int and 1 <= value < TOO_LARGE:  # first, as it is asked in every call
        return (value, value)
    wanted = "an integer >= 1 or two of them"
    pair = _integers(op, name, wanted, value, 2)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"{op}: {name} must be {wanted}, got {value!r}")
    return pair


def _sides(op: str, padding: Padding) -> str | tuple[int, int, int, int]:
    """(left, right, top, bottom), or "same", for which they follow from the sizes."""
    if type(padding) is int and 0 <= padding < TOO_LARGE:
        return (padding,) * 4
    if isinstance(padding, str):
        check_choice(op, "padding", padding, ("same",))
        return "same"
    wanted = "'same', an integer >= 0, (vertical, horizontal) or (left, right, top, bottom)"
    sides = _integers(op, "padding", wanted, padding, 4)
    if len(sides) == 2:
        sides = (sides[1], sides[1], sides[0], sides[0])
    if len(sides) != 4 or min(sides) < 0:
        raise ValueError(f"{op}: padding must be {wanted}, got {padding!r}")
    return sides


def _integers(op: str, name: str, wanted: str, value: Any, count: int) -> tuple[int, ...]:
    """Those of a list or tuple, or one number `count` times, as plain ints."""
    numbers = tuple(map(plain_integer, value if isinstance(value, list | tuple) else (value,) * count))
    if None in numbers:
        raise TypeError(f"{op}: {name} must be {wanted}, got {value!r}")
    return numbers  # type: ignore[return-value]


def _geometry(op, x: Tensor, weight: Tensor, stride, padding, dilation, name: str = "x") -> Geometry:
    stride, dilation = _pair(op, "stride", stride), _pair(op, "dilation", dilation)
    geometry = _resolve_once(op, x.shape, weight.shape, stride, _sides(op, padding), dilation, name)
    if geometry.size[0] < 1 or geometry.size[1] < 1:
        got = f"{list(x.shape)} with padding {padding!r}"
        raise ValueError(
            f"{op}: the padded {name} must not be smaller than the filter {list(weight.shape[2:])}, got {got}"
        )
    return geometry


def _resolve(op, shape, weight_shape, stride, sides, dilation, name) -> Geometry:
    if len(shape) != 4:
        raise ValueError(f"{op}: {name} must have shape [N, C, H, W], got {list(shape)}")
    if shape[2] == 0 or shape[3] == 0:
        raise ValueError(f"{op}: {name} must have at least one row and one column, got {list(shape)}")
    channels, filters = shape[1], weight_shape[0] if weight_shape else 0
    fits = len(weight_shape) == 4 and weight_shape[1] == 1 and min(weight_shape[2:]) >= 1
    if not fits or (filters != channels and (channels == 0 or filters % channels or not filters)):
        raise ValueError(f"{op}: weight must have shape [{channels}, 1, k, k], got {list(weight_shape)}")
    kernel = (weight_shape[2], weight_shape[3])
    if sides == "same":
        totals = [
            max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
            for n, k, s, d in zip(shape[2:], kernel, stride, dilation, strict=True)
        ]
        (top, left) = (total // 2 for total in totals)
        sides = (left, totals[1] - left, top, totals[0] - top)
    padded = (shape[2] + sides[2] + sides[3], shape[3] + sides[0] + sides[1])
    height, width = (
        (n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(padded, kernel, stride, dilation, strict=True)
    )
    has_kernel = (
        kernel in ((3, 3), (5, 5)) and stride in ((1, 1), (2, 2)) and dilation == (1, 1) and filters == channels
    )
    return Geometry(stride, dilation, sides, (height, width), has_kernel)


_resolve_once = remembered(_resolve)
