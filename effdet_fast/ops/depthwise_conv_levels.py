"""One depthwise filter over several maps at once, as the heads of a detector share theirs over the levels of the pyramid."""

from collections.abc import Sequence

import torch
from torch import Tensor

from effdet_fast._choices import ACTIVATIONS, MAX_LEVELS
from effdet_fast.ops import _library
from effdet_fast.ops._arguments import (
    autocast_dtype,
    check_choice,
    check_floating,
    check_same_device,
    dtype_name,
)
from effdet_fast.ops._layout import empty_in_layout, in_layout, is_channels_last, with_strides_of
from effdet_fast.ops.depthwise_conv import (
    Geometry,
    Padding,
    _autocast,
    _autocast_filter,
    _check_operand,
    _geometry,
    _pytorch,
    depthwise_conv2d_reference,
    empty_filters,
)


def depthwise_conv2d_levels_reference(
    xs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: Padding = 0,
    *,
    prologue: str | None = None,
) -> list[Tensor]:
    """Reference for `depthwise_conv2d_levels`: convolves the maps one by one with ``F.conv2d``."""
    return [depthwise_conv2d_reference(x, weight, bias, stride, padding, prologue=prologue) for x in xs]


def _forward_fake(xs, weight, bias, stride, left, top, out_height, out_width, prologue, channels_last):
    sizes = zip(xs, out_height, out_width, strict=True)
    return [empty_in_layout(x, (x.shape[0], x.shape[1], height, width), channels_last) for x, height, width in sizes]


def _grad_input_fake(grads, xs, weight, stride, left, top, prologue, channels_last):
    return [empty_in_layout(x, x.shape, channels_last) for x in xs]


def _grad_weight_fake(grads, xs, kernel, stride, left, top, prologue, channels_last, with_bias, in_float32):
    return empty_filters(xs[0], xs[0].shape[1], kernel, with_bias, in_float32)


_GEOMETRY = "int stride, SymInt[] left, SymInt[] top"
_convolve = _library.define(
    f"depthwise_conv_levels(Tensor[] xs, Tensor weight, Tensor? bias, {_GEOMETRY}, SymInt[] out_height, SymInt[] out_width, "
    "int prologue, bool channels_last) -> Tensor[]",
    _forward_fake,
)
_grad_input = _library.define(
    f"depthwise_conv_levels_grad_input(Tensor[] grads, Tensor[] xs, Tensor weight, {_GEOMETRY}, int prologue, "
    "bool channels_last) -> Tensor[]",
    _grad_input_fake,
)
_grad_weight = _library.define(
    f"depthwise_conv_levels_grad_weight(Tensor[] grads, Tensor[] xs, int kernel, {_GEOMETRY}, int prologue, "
    "bool channels_last, bool with_bias, bool in_float32) -> (Tensor, Tensor)",
    _grad_weight_fake,
)


class _DepthwiseConvLevels(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, bias, geometries, prologue, channels_last, *xs):
        ctx.save_for_backward(weight, *xs)
        ctx.set_materialize_grads(False)
        ctx.geometries, ctx.prologue, ctx.channels_last = geometries, prologue, channels_last
        return tuple(_forward(weight, bias, geometries, prologue, channels_last, *xs))

    @staticmethod
    def backward(ctx, *grads):
        weight, *xs = ctx.saved_tensors
        need_weight, need_bias, _, _, _, *need_xs = ctx.needs_input_grad
        used = [i for i, grad in enumerate(grads) if grad is not None]
        wanted = [i for i in used if need_xs[i]]
        grad_xs: list[Tensor | None] = [None] * len(xs)
        grad_weight = grad_bias = None
        if used and _library.wants_second_derivative():
            # The bias is not kept: its gradient needs no value of it.
            bias = weight.new_zeros(weight.shape[0], requires_grad=True) if need_bias else None

            def reference(weight: Tensor, bias: Tensor | None, *xs: Tensor) -> list[Tensor]:
                return [_pytorch(xs[i], weight, bias, ctx.geometries[i], ctx.prologue) for i in used]

            needs = (need_weight, need_bias, *need_xs)
            found = _library.gradients(reference, (weight, bias, *xs), needs, [grads[i] for i in used])
            grad_weight, grad_bias, *grad_xs = found
        elif used:
            dense = {i: in_layout(grads[i], ctx.channels_last) for i in used}
            last = (ACTIVATIONS[ctx.prologue], ctx.channels_last)
            if wanted:
                some = [dense[i] for i in wanted], [xs[i] for i in wanted]
                found = iter(_grad_input(*some, weight, *_numbers([ctx.geometries[i] for i in wanted]), *last))
                for i in wanted:
                    grad_xs[i] = next(found)
            if need_weight or need_bias:
                some = [dense[i] for i in used], [xs[i] for i in used]
                numbers = _numbers([ctx.geometries[i] for i in used])
                sums = _grad_weight(*some, weight.shape[2], *numbers, *last, need_bias, weight.dtype != xs[0].dtype)
                grad_weight = with_strides_of(weight, sums[0]) if need_weight else None
                grad_bias = sums[1] if need_bias else None
        return grad_weight, grad_bias, None, None, None, *grad_xs


def _numbers(geometries: Sequence[Geometry]) -> tuple[int, list[int], list[int]]:
    """(stride, left, top) as the raw ops take them."""
    return geometries[0].stride[0], [g.sides[0] for g in geometries], [g.sides[2] for g in geometries]


def _forward(weight, bias, geometries, prologue, channels_last, *xs) -> list[Tensor]:
    heights, widths = [g.size[0] for g in geometries], [g.size[1] for g in geometries]
    numbers = _numbers(geometries)
    return _convolve(xs, weight, bias, *numbers, heights, widths, ACTIVATIONS[prologue], channels_last)


def depthwise_conv2d_levels(
    xs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: Padding = 0,
    *,
    prologue: str | None = None,
) -> list[Tensor]:
    """Convolve all levels of a pyramid with one depthwise filter in one pass.

    `depthwise_conv2d` of each map in one launch; one more for their gradients, one for the filter's.
    What it spares is launches: a detector's pyramid has five levels, and all but the first are small.

    Args:
        xs: 1 to 8 maps ``[N, C, H, W]``; N, H and W may differ, C, dtype and device may not. float16, bfloat16, float32 or
            float64; any strides. All are read, and written, in the memory format of the first; contiguous and channels_last
            maps in it are read in place.
        weight: ``[C, 1, k, k]``, of the dtype of the maps.
        bias: ``[C]``, or None.
        stride: one number or (vertical, horizontal).
        padding: as in `depthwise_conv2d`; "same" pads each map according to its size.
        prologue: None, "silu", "relu" or "relu6", applied to each input element before padding.

    Returns:
        For each map ``[N, C, OH, OW]``, with the values of `depthwise_conv2d`, under autocast too. Twice differentiable.
        The gradients of ``weight`` and ``bias`` are summed over all maps in float32 (float64 for float64) in a fixed order
        and rounded once. Deterministic: the same bits in every run and for every thread count.

    Raises:
        TypeError: ``xs`` is no list or tuple of Tensors, a dtype is not supported, or dtypes differ outside autocast; a number is
            not an integer.
        ValueError: there are no maps or more than 8, shapes, devices or numbers do not fit, or a padded map is smaller than the
            filter.
    """
    op = "depthwise_conv2d_levels"
    if not isinstance(xs, list | tuple):
        raise TypeError(f"{op}: xs must be a list or tuple of Tensors, got {type(xs).__name__}")
    if not 1 <= len(xs) <= MAX_LEVELS:
        raise ValueError(f"{op}: xs must have 1 to {MAX_LEVELS} maps, got {len(xs)}")
    check_floating(op, "weight", weight)
    for i, x in enumerate(xs):
        check_floating(op, f"xs[{i}]", x)
        check_same_device(op, f"xs[{i}]", x, "xs[0]", xs[0])
        if x.dtype != xs[0].dtype and autocast_dtype(x) is None:
            wanted = dtype_name(xs[0].dtype)
            raise TypeError(f"{op}: xs[{i}] must have the dtype of xs[0], {wanted}, got {dtype_name(x.dtype)}")
        if x.dim() == xs[0].dim() == 4 and x.shape[1] != xs[0].shape[1]:
            wanted = f"the {xs[0].shape[1]} channels of xs[0]"
            raise ValueError(f"{op}: xs[{i}] must have {wanted}, got {list(x.shape)}")
    geometries = tuple(_geometry(op, x, weight, stride, padding, 1, f"xs[{i}]") for i, x in enumerate(xs))
    _check_operand(op, "weight", weight, xs[0], "xs[0]")
    if bias is not None:
        check_floating(op, "bias", bias)
        _check_operand(op, "bias", bias, xs[0], "xs[0]")
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{op}: bias must have shape {list(weight.shape[:1])}, got {list(bias.shape)}")
    check_choice(op, "prologue", prologue, ACTIVATIONS)
    dtype = autocast_dtype(xs[0])
    if dtype is not None:
        xs = [_autocast(x, dtype) for x in xs]
        weight, bias = _autocast_filter(xs[0], weight, bias)
    if not (geometries[0].has_kernel and _library.is_native(xs[0])):
        return [_pytorch(x, weight, bias, geometry, prologue) for x, geometry in zip(xs, geometries, strict=True)]
    channels_last = is_channels_last(xs[0])
    xs = [in_layout(x, channels_last) for x in xs]
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    operands = [*xs, weight] if bias is None else [*xs, weight, bias]
    needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in operands)
    run = _DepthwiseConvLevels.apply if needs_gradient else _forward
    return list(run(weight, bias, geometries, prologue, channels_last, *xs))
