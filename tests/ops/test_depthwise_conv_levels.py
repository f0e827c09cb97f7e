"""The depthwise convolution of several maps with one filter, on every backend."""

import ctypes
import re

import pytest
import torch
import torch.nn.functional as F

from effdet_fast import nn as effdet_nn
from effdet_fast import ops
from tests.checks import (
    ACTIVATIONS,
    all_equal,
    assert_same_in_any_order,
    assert_same_in_every_run,
    random_map,
    with_gradients,
)
from tests.emulation.backend import emulated, load
from tests.ops.accuracy import assert_convolved

HALF = (torch.float16, torch.bfloat16)
# (N, H, W): a pyramid with odd sizes, down to one pixel, and a batch of its own
SIZES = ((2, 13, 9), (2, 7, 5), (3, 4, 3), (2, 2, 2), (2, 1, 1))


pytestmark = pytest.mark.usefixtures("one_thread")


def make(channels=6, kernel=3, channels_last=True, sizes=SIZES, dtype=torch.float32, device="cpu"):
    xs = [random_map((n, channels, h, w), dtype, device, channels_last, deviation=2.0) for n, h, w in sizes]
    filters = torch.randn(channels, 1, kernel, kernel, device=device), torch.randn(channels, device=device)
    return [t.requires_grad_() for t in (*xs, *(f.to(dtype) for f in filters))]


def separately(*inputs, **options):
    """What the op stands for, with PyTorch's sum over the maps."""
    *xs, weight, bias = inputs
    return [ops.depthwise_conv2d(x, weight, bias, **options) for x in xs]


def together(*inputs, **options):
    *xs, weight, bias = inputs
    return ops.depthwise_conv2d_levels(xs, weight, bias, **options)


def by_pytorch(*inputs, stride, prologue):
    """Filters of three, padded as "same" pads them for stride 1 and, with odd sizes, for stride 2."""
    *xs, weight, bias = inputs
    pad = weight.shape[2] // 2
    return [F.conv2d(ACTIVATIONS[prologue](x), weight, bias, stride, pad, groups=x.shape[1]) for x in xs]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kernel, stride, prologue", [(3, 1, None), (5, 1, "silu"), (3, 2, "silu")])
def test_values_and_gradients(backend, kernel, stride, prologue, channels_last, dtype):
    sizes = SIZES if stride == 1 else ((2, 13, 9), (1, 5, 3), (2, 1, 1))
    inputs = make(10, kernel, channels_last, sizes, dtype, backend.device)
    options = dict(stride=stride, prologue=prologue)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    grads = [torch.randn_like(y).to(dtype) for y in by_pytorch(*exact, **options)]
    expected = with_gradients(by_pytorch, exact, grad=grads, **options)
    actual = with_gradients(together, inputs, grad=grads, padding="same", **options)
    in_half = with_gradients(by_pytorch, inputs, grad=grads, **options) if dtype in HALF else expected
    assert all(t.dtype == dtype for t in actual)
    assert_convolved(actual, expected, in_half)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for a in actual[: len(sizes)]:
        assert a.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("channels", [1, 7, 88])
def test_each_map_has_the_bits_it_has_alone(native_backend, channels, channels_last):
    inputs = make(channels, 5, channels_last, device=native_backend.device)
    options = dict(stride=2, padding="same", prologue="silu")
    actual, expected = (with_gradients(f, inputs, **options) for f in (together, separately))
    assert all_equal(actual[:-2], expected[:-2])
    for a, e in zip(actual[-2:], expected[-2:], strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


def test_tall_maps_take_several_tiles(native_backend):
    sizes = ((1, 70, 6), (1, 40, 5), (1, 3, 3))
    inputs = make(4, 3, True, sizes, device=native_backend.device)
    actual, expected = (with_gradients(f, inputs, padding=1) for f in (together, separately))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_same_bits_on_every_gpu(channels_last):
    """How large the device is decides how tall tiles are, and nothing else."""
    inputs = make(6, 5, channels_last, ((2, 40, 9), (1, 17, 5), (1, 2, 3)))
    controls, results = load(), []
    for multiprocessors in (1, 2, 132):
        controls.ef_set_multiprocessors(ctypes.c_int64(multiprocessors))
        try:
            with emulated():
                results.append(with_gradients(together, inputs, padding="same", prologue="silu"))
        finally:
            controls.ef_set_multiprocessors(ctypes.c_int64(132))
    assert all(all_equal(result, results[0]) for result in results)


def test_views_into_nan_and_mixed_layouts(backend):
    """Any strides are accepted; the layout of the first holds for all, and nothing outside a view is read."""
    nan = torch.full((2, 20, 9, 9), float("nan"), device=backend.device)
    sliced = nan.to(memory_format=torch.channels_last)[:, 3:11, 1:8, 2:9]
    misaligned = torch.full((2 * 8 * 25 + 3,), float("nan"), device=backend.device)[1:-2].view(2, 5, 5, 8)
    maps = [sliced, misaligned.permute(0, 3, 1, 2), nan[:, :8, :4, 1:].mT, torch.zeros(2, 8, 1, 1)]
    maps = [x.copy_(torch.randn_like(x)).to(backend.device) for x in maps]
    *_, weight, bias = make(8, device=backend.device)
    for first in (0, 2):  # of the four, the one whose layout holds for all
        xs = [x.detach().requires_grad_() for x in (*maps[first:], *maps[:first])]
        channels_last = first == 0
        inputs = [*xs, weight, bias]
        actual = with_gradients(together, inputs, padding="same")
        expected = with_gradients(by_pytorch, inputs, stride=1, prologue=None)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
        for y in actual[:4] if backend.name != "reference" else ():
            assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@pytest.mark.parametrize("channels_last", [False, True])
def test_empty_maps_take_no_part(backend, channels_last):
    inputs = make(6, 3, channels_last, ((2, 5, 4), (0, 3, 3), (1, 2, 2)), device=backend.device)
    actual = with_gradients(together, inputs, padding="same")
    expected = with_gradients(separately, inputs, padding="same")
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
    for nothing in (
        make(6, 3, channels_last, ((0, 5, 4), (0, 3, 3)), device=backend.device),
        make(0, 3, channels_last, device=backend.device),
    ):
        *_, grad_weight, grad_bias = with_gradients(together, nothing, stride=2, padding="same")
        assert torch.equal(grad_weight, torch.zeros_like(nothing[-2]))
        assert torch.equal(grad_bias, torch.zeros_like(nothing[-1]))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradcheck(backend, stride, channels_last):
    inputs = make(2, 3, channels_last, ((1, 4, 3), (1, 2, 2), (2, 1, 1)), torch.float64, backend.device)
    options = dict(stride=stride, padding="same", prologue="silu")
    assert torch.autograd.gradcheck(lambda *t: together(*t, **options), inputs, nondet_tol=0.0)


def test_second_derivatives(backend):
    inputs = make(2, 3, False, ((1, 3, 2), (1, 2, 2)), torch.float64, backend.device)
    options = dict(padding="same", prologue="silu")
    assert torch.autograd.gradgradcheck(lambda *t: together(*t, **options), inputs)
    assert torch.autograd.gradgradcheck(lambda a, b, w: together(a, b, w, None, **options)[1:], inputs[:3])


def test_only_what_is_asked_for(native_backend):
    """Maps that lead nowhere take no part, and no gradient is made for inputs that want none."""
    inputs = make(device=native_backend.device)
    *xs, weight, bias = inputs
    ys = together(*inputs, padding=1)
    expected = torch.autograd.grad([ys[1].sum(), ys[3].sum()], inputs, allow_unused=True)
    assert [g is None for g in expected] == [True, False, True, False, True, False, False]
    alone = separately(xs[1], xs[3], weight, bias, padding=1)
    for a, e in zip(
        torch.autograd.grad([y.sum() for y in alone], (xs[1], xs[3], weight, bias)),
        [g for g in expected if g is not None],
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
    some = [xs[0].detach(), xs[1], weight.detach(), bias]
    loss = sum(y.sum() for y in together(*some, padding=1))
    grads = torch.autograd.grad(loss, (xs[1], bias))
    assert torch.equal(grads[0], expected[1]) and grads[1].isfinite().all()
    with torch.no_grad():
        assert not any(y.requires_grad for y in together(*inputs, padding=1))


def test_second_backward_and_mutation(native_backend):
    inputs = make(device=native_backend.device)
    loss = sum(y.square().sum() for y in together(*inputs, padding=1, prologue="silu"))
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs, retain_graph=True)
    assert all_equal(first, second)
    with torch.no_grad():
        inputs[-2].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("channels_last", [False, True])
def test_same_bits_every_time_and_for_any_number_of_threads(native_backend, channels_last):
    large = ((2, 33, 31), (2, 17, 16), (2, 5, 5))
    sizes = SIZES if native_backend.name == "emulated" else large
    inputs = make(24, 3, channels_last, sizes, torch.bfloat16, native_backend.device)
    repeats = 3 if native_backend.name == "emulated" else 20
    assert_same_in_every_run(lambda: with_gradients(together, inputs, padding="same"), repeats)


def test_every_order_of_threads_gives_the_same_bits():
    problems = [make(10, 3, channels_last) for channels_last in (False, True)]
    assert_same_in_any_order(lambda: [with_gradients(together, inputs, padding="same") for inputs in problems])


@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(device, channels_last):
    inputs = make(6, 5, channels_last, ((2, 7, 8), (2, 3, 4)), torch.bfloat16, device)
    *xs, weight, bias = (t.detach() for t in inputs)
    raw, numbers = torch.ops.effdet_fast, (2, [1, 2], [1, 2])
    arguments = (xs, weight, bias, *numbers, [4, 2], [4, 2], 1, channels_last)
    ys = raw.depthwise_conv_levels(*arguments)
    torch.library.opcheck(raw.depthwise_conv_levels, arguments)
    torch.library.opcheck(raw.depthwise_conv_levels, (xs, weight, None, *arguments[3:]))
    torch.library.opcheck(raw.depthwise_conv_levels_grad_input, (ys, xs, weight, *numbers, 1, channels_last))
    for last in ((False, False), (True, False), (True, True)):
        arguments = (ys, xs, 5, *numbers, 1, channels_last, *last)
        torch.library.opcheck(raw.depthwise_conv_levels_grad_weight, arguments)


@pytest.mark.compiles
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_full_graph(device, dynamic):
    def function(*inputs):
        return sum(y.square().sum() for y in together(*inputs, padding=1, prologue="silu"))

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for sizes in ((7, 8), (9, 12)):
        inputs = make(sizes=((2, *sizes), (2, 4, 4)), device=device)
        expected = torch.autograd.grad(function(*inputs), inputs)
        for a, e in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize("dtype", HALF)
def test_autocast(backend, dtype):
    inputs = make(device=backend.device)
    mixed = [t.detach().to(dtype) if i == 1 else t for i, t in enumerate(inputs)]  # filters stay float32
    with torch.autocast(backend.device.type, dtype):
        actual, expected = together(*mixed, padding="same"), separately(*mixed, padding="same")
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype and torch.equal(a, e)
    wanted = [inputs[0], *inputs[2:]]
    for grad in torch.autograd.grad(sum(y.float().sum() for y in actual), wanted):
        assert grad.dtype == torch.float32


@pytest.mark.parametrize("kernel, stride", [(7, 1), (1, 1), (3, 3)])
def test_what_has_no_kernel_runs_through_pytorch(backend, kernel, stride):
    inputs = make(6, kernel, device=backend.device)
    options = dict(stride=stride, padding="same", prologue="relu")
    assert all_equal(together(*inputs, **options), separately(*inputs, **options))
    *xs, weight, bias = inputs
    for a, e in zip(
        together(*inputs, **options), ops.depthwise_conv2d_levels_reference(xs, weight, bias, **options), strict=True
    ):
        torch.testing.assert_close(a, e)


X, W, B = torch.zeros(2, 6, 5, 5), torch.zeros(6, 1, 3, 3), torch.zeros(6)


@pytest.mark.parametrize(
    "error, message, arguments, options",
    [
        (TypeError, "xs must be a list or tuple of Tensors, got Tensor", (X, W), {}),
        (TypeError, "xs[1] must be a Tensor, got int", ([X, 1], W), {}),
        (TypeError, "xs[0] must be float16, bfloat16, float32 or float64, got int64", ([X.long()], W), {}),
        (TypeError, "xs[1] must have the dtype of xs[0], float32, got float64", ([X, X.double()], W), {}),
        (TypeError, "weight must have the dtype of xs[0], float32, got float64", ([X], W.double()), {}),
        (TypeError, "bias must have the dtype of xs[0], float32, got float16", ([X], W, B.half()), {}),
        (ValueError, "xs must have 1 to 8 maps, got 0", ([], W), {}),
        (ValueError, "xs must have 1 to 8 maps, got 9", ([X] * 9, W), {}),
        (ValueError, "xs[1] must have shape [N, C, H, W], got [6, 5, 5]", ([X, X[0]], W), {}),
        (ValueError, "xs[2] must have at least one row and one column, got [2, 6, 0, 5]", ([X, X, X[:, :, :0]], W), {}),
        (ValueError, "xs[1] must have the 6 channels of xs[0], got [2, 4, 5, 5]", ([X, X[:, :4]], W), {}),
        (ValueError, "xs[1] must be on the device of xs[0], cpu, got meta", ([X, X.to("meta")], W), {}),
        (ValueError, "weight must have shape [6, 1, k, k], got [4, 1, 3, 3]", ([X], W[:4]), {}),
        (ValueError, "weight must be on the device of xs[0], cpu, got meta", ([X], W.to("meta")), {}),
        (ValueError, "bias must have shape [6], got [5]", ([X], W, B[:5]), {}),
        (ValueError, "stride must be an integer >= 1 or two of them, got 0", ([X], W), dict(stride=0)),
        (ValueError, "padding must be one of 'same', got 'valid'", ([X], W), dict(padding="valid")),
        (
            ValueError,
            "prologue must be one of None, 'silu', 'relu', 'relu6', got 'gelu'",
            ([X], W),
            dict(prologue="gelu"),
        ),
        (
            ValueError,
            "the padded xs[1] must not be smaller than the filter [3, 3], got [2, 6, 2, 5] with padding 0",
            ([X, X[:, :, :2]], W),
            {},
        ),
    ],
)
def test_bad_input(error, message, arguments, options):
    with pytest.raises(error, match=re.escape(f"depthwise_conv2d_levels: {message}")):
        ops.depthwise_conv2d_levels(*arguments, **options)


def test_raw_ops_guard_themselves():
    raw = torch.ops.effdet_fast
    with pytest.raises(RuntimeError, match="1 to 8 maps, and for each its numbers"):
        raw.depthwise_conv_levels([X, X], W, None, 1, [1], [1, 1], [5, 5], [5, 5], 0, False)
    with pytest.raises(RuntimeError, match="weight must be dense"):
        raw.depthwise_conv_levels([X, X[:, :4].contiguous()], W, None, 1, [1, 1], [1, 1], [5, 5], [5, 5], 0, False)
    with pytest.raises(RuntimeError, match="same channels and dtype"):
        y = X[:, :4].contiguous()
        raw.depthwise_conv_levels_grad_weight([X, y], [X, y], 3, 1, [1, 1], [1, 1], 0, False, False, False)


@pytest.mark.parametrize("dilation", [1, 2])
def test_modules(backend, dilation):
    *xs, _, _ = make(device=backend.device)
    module = effdet_nn.DepthwiseConv2d(6, 3, padding="same", dilation=dilation, prologue="silu").to(backend.device)
    for a, x in zip(module(xs), xs, strict=True):
        torch.testing.assert_close(a, module(x))
    separable = effdet_nn.SeparableConv2d(6, 4).to(backend.device)
    for a, x in zip(separable(xs), xs, strict=True):
        torch.testing.assert_close(a, separable(x))
