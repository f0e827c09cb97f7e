"""What holds for every call of the depthwise convolution: gradients, determinism, PyTorch integration, errors, the modules."""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from torch import nn

from effdet_fast import nn as effdet_nn
from effdet_fast import ops
from tests.checks import all_equal, assert_same_in_any_order, assert_same_in_every_run, random_map, with_gradients

pytestmark = pytest.mark.usefixtures("one_thread")


def make(size=(2, 6, 7, 8), kernel=3, channels_last=True, **options):
    x = random_map(size, channels_last=channels_last, **options)
    inputs = [x, torch.randn(size[1], 1, kernel, kernel, **options), torch.randn(size[1], **options)]
    return [t.requires_grad_() for t in inputs]


@pytest.mark.parametrize("kernel, stride", itertools.product((3, 5), (1, 2)))
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradcheck(backend, kernel, stride, channels_last):
    inputs = make((2, 2, 4, 5), kernel, channels_last, dtype=torch.float64, device=backend.device)
    assert torch.autograd.gradcheck(
        lambda *t: ops.depthwise_conv2d(*t, stride, "same", prologue="silu"), inputs, nondet_tol=0.0
    )


@pytest.mark.parametrize("count", [2, 3])
def test_second_derivatives(backend, count):
    inputs = make((1, 2, 4, 3), 3, False, dtype=torch.float64, device=backend.device)[:count]
    assert torch.autograd.gradgradcheck(
        lambda *t: ops.depthwise_conv2d(*t, stride=2, padding="same", prologue="silu"), inputs
    )


@pytest.mark.parametrize(
    "needed", [(True, False, False), (False, True, False), (False, False, True), (False, True, True)]
)
def test_only_the_gradients_asked_for(native_backend, needed):
    inputs = make(device=native_backend.device)
    wanted = [t for t, need in zip(inputs, needed, strict=True) if need]
    expected = torch.autograd.grad(ops.depthwise_conv2d(*inputs, 1, 1).sum(), wanted)
    call = [t if need else t.detach() for t, need in zip(inputs, needed, strict=True)]
    for a, e in zip(torch.autograd.grad(ops.depthwise_conv2d(*call, 1, 1).sum(), wanted), expected, strict=True):
        assert torch.equal(a, e)


def test_second_backward_and_mutation(native_backend):
    x, weight, bias = make(device=native_backend.device)
    y = ops.depthwise_conv2d(x, weight, bias, 2, "same", prologue="silu")
    first = torch.autograd.grad(y.sum(), (x, weight, bias), retain_graph=True)
    second = torch.autograd.grad(y.sum(), (x, weight, bias), retain_graph=True)
    assert all_equal(first, second)
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), x)


def test_upstream_gradient_of_any_strides(native_backend):
    x, weight, _ = make((2, 6, 5, 5), device=native_backend.device)
    for channels_last in (False, True):
        x = x.detach().contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        x.requires_grad_()
        y = ops.depthwise_conv2d(x, weight, None, 1, 1)
        grad = torch.randn(2, 6, 5, 5, device=native_backend.device)
        expected = torch.autograd.grad(y, (x, weight), grad, retain_graph=True)
        for same in (grad.to(memory_format=torch.channels_last), grad.mT.contiguous().mT):
            actual = torch.autograd.grad(y, (x, weight), same, retain_graph=True)
            assert all_equal(actual, expected)
        assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()  # an expanded scalar


def run_of(size, kernel, channels_last, dtype, device):
    inputs = make(size, kernel, channels_last, dtype=dtype, device=device)
    grad = torch.linspace(-1, 2, inputs[0].numel(), device=device).view(size)
    return lambda: with_gradients(ops.depthwise_conv2d, inputs, 1, "same", prologue="silu", grad=grad)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_every_time_and_for_any_number_of_threads(native_backend, channels_last, dtype):
    size = (2, 10, 9, 9) if native_backend.name == "emulated" else (3, 40, 45, 47)
    run = run_of(size, 5, channels_last, dtype, native_backend.device)
    assert_same_in_every_run(run, 4 if native_backend.name == "emulated" else 20)


def test_every_order_of_threads_gives_the_same_bits():
    runs = [run_of((2, 6, 9, 9), 3, channels_last, torch.float32, "cpu") for channels_last in (False, True)]
    assert_same_in_any_order(lambda: [run() for run in runs])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(device, channels_last, dtype):
    x, weight, bias = (t.detach() for t in make((2, 6, 7, 8), 5, channels_last, dtype=dtype, device=device))
    raw = torch.ops.effdet_fast
    y = raw.depthwise_conv(x, weight, bias, 2, 1, 1, 4, 4, 1, channels_last)
    torch.library.opcheck(raw.depthwise_conv, (x, weight, bias, 2, 1, 1, 4, 4, 1, channels_last))
    torch.library.opcheck(raw.depthwise_conv, (x, weight, None, 2, 1, 1, 4, 4, 0, channels_last))
    torch.library.opcheck(raw.depthwise_conv_grad_input, (y, x, weight, 2, 1, 1, 1, channels_last))
    torch.library.opcheck(raw.depthwise_conv, (x, weight.float(), bias.float(), 2, 1, 1, 4, 4, 0, channels_last))
    torch.library.opcheck(raw.depthwise_conv_grad_input, (y, x, weight.float(), 2, 1, 1, 1, channels_last))
    for last in ((False, False), (True, False), (True, True)):
        torch.library.opcheck(raw.depthwise_conv_grad_weight, (y, x, 5, 2, 1, 1, 1, channels_last, *last))


@pytest.mark.compiles
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_full_graph(device, dynamic):
    def function(x, weight, bias):
        return ops.depthwise_conv2d(x, weight, bias, 2, "same", prologue="silu").square().sum()

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in ((2, 6, 7, 8), (2, 6, 9, 12)):
        inputs = make(size, device=device)
        expected = torch.autograd.grad(function(*inputs), inputs)
        for a, e in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
            torch.testing.assert_close(a, e)


@pytest.mark.compiles
def test_compile_full_graph_separable(device):
    module = effdet_nn.SeparableConv2d(6, 4, prologue="silu").to(device)
    x = make(device=device)[0]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend, dtype):
    inputs = make(device=backend.device)
    with torch.autocast(backend.device.type, dtype):
        y = ops.depthwise_conv2d(*inputs, 1, "same", prologue="silu")
        z = ops.depthwise_separable_conv2d(
            inputs[0], inputs[1], torch.randn(5, 6, 1, 1, device=backend.device), prologue="silu", activation="relu6"
        )
        peer = F.conv2d(F.silu(inputs[0]), inputs[1], inputs[2], padding=1, groups=6)
    assert y.dtype == z.dtype == peer.dtype == dtype
    torch.testing.assert_close(y.float(), peer.float(), rtol=0.02, atol=0.05)
    for t, grad in zip(inputs, torch.autograd.grad(y.float().sum(), inputs), strict=True):
        assert grad.dtype == t.dtype == torch.float32
    with torch.autocast(backend.device.type, dtype):
        assert ops.depthwise_conv2d(*(t.detach().double() for t in inputs)).dtype == torch.float64


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_filters_under_autocast(backend, dtype, channels_last):
    """They are used rounded, as PyTorch rounds them; their gradients are not rounded."""
    x, weight, bias = make((2, 6, 9, 8), 5, channels_last, device=backend.device)
    options = dict(stride=2, padding="same", prologue="silu")
    rounded = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)]
    with torch.autocast(backend.device.type, dtype):
        y = ops.depthwise_conv2d(x, weight, bias, **options)
    assert torch.equal(y, ops.depthwise_conv2d(*rounded, **options))
    exact = [t.detach().double().requires_grad_() for t in rounded]
    upstream = torch.randn_like(y)
    actual = torch.autograd.grad(y, [x, weight, bias], upstream)
    in_half = torch.autograd.grad(ops.depthwise_conv2d(*rounded, **options), rounded, upstream)
    expected = torch.autograd.grad(ops.depthwise_conv2d_reference(*exact, **options), exact, upstream.double())
    assert torch.equal(actual[0].to(dtype), in_half[0])
    for a, h, e in zip(actual[1:], in_half[1:], expected[1:], strict=True):
        assert a.dtype == torch.float32 and h.dtype == dtype
        error, of_half = ((t.double() - e).abs().max() for t in (a, h))
        assert error <= of_half if backend.name == "reference" else error < of_half / 50


@pytest.mark.parametrize("activation", [None, "silu", "relu", "relu6"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_separable(backend, activation, channels_last):
    x, depthwise, _ = make((2, 6, 9, 8), 5, channels_last, device=backend.device)
    pointwise = torch.randn(10, 6, 1, 1, device=backend.device).requires_grad_()
    bias = torch.randn(10, device=backend.device).requires_grad_()
    inputs = [x, depthwise, pointwise, bias]

    def peer(x, depthwise, pointwise, bias):
        y = F.conv2d(F.conv2d(F.relu(x), depthwise, stride=2, padding=2, groups=6), pointwise, bias)
        return y if activation is None else getattr(F, activation)(y)

    y = ops.depthwise_separable_conv2d(*inputs, 2, 2, prologue="relu", activation=activation)
    torch.testing.assert_close(y, peer(*inputs), rtol=1e-4, atol=1e-4)
    reference = ops.depthwise_separable_conv2d_reference(*inputs, 2, 2, prologue="relu", activation=activation)
    torch.testing.assert_close(y, reference, rtol=1e-4, atol=1e-4)
    assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    for a, e in zip(
        torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(peer(*inputs).sum(), inputs), strict=True
    ):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


X, W, B = torch.zeros(2, 6, 5, 5), torch.zeros(6, 1, 3, 3), torch.zeros(6)


@pytest.mark.parametrize(
    "error, message, arguments, options",
    [
        (TypeError, "x must be a Tensor, got list", ([1], W), {}),
        (TypeError, "x must be float16, bfloat16, float32 or float64, got int64", (X.long(), W), {}),
        (TypeError, "weight must have the dtype of x, float32, got float64", (X, W.double()), {}),
        (TypeError, "bias must have the dtype of x, float32, got float16", (X, W, B.half()), {}),
        (ValueError, "x must have shape [N, C, H, W], got [6, 5, 5]", (X[0], W), {}),
        (ValueError, "x must have at least one row and one column, got [2, 6, 0, 5]", (X[:, :, :0], W), {}),
        (ValueError, "weight must have shape [6, 1, k, k], got [6, 3, 3]", (X, W[:, 0]), {}),
        (ValueError, "weight must have shape [6, 1, k, k], got [4, 1, 3, 3]", (X, W[:4]), {}),
        (ValueError, "weight must have shape [6, 1, k, k], got [6, 2, 3, 3]", (X, torch.zeros(6, 2, 3, 3)), {}),
        (ValueError, "weight must be on the device of x, cpu, got meta", (X, W.to("meta")), {}),
        (ValueError, "bias must have shape [6], got [5]", (X, W, B[:5]), {}),
        (ValueError, "stride must be an integer >= 1 or two of them, got 0", (X, W), dict(stride=0)),
        (
            ValueError,
            "dilation must be an integer >= 1 or two of them, got (1, 2, 3)",
            (X, W),
            dict(dilation=(1, 2, 3)),
        ),
        (ValueError, "padding must be one of 'same', got 'valid'", (X, W), dict(padding="valid")),
        (
            ValueError,
            "padding must be 'same', an integer >= 0, (vertical, horizontal) or (left, right, top, bottom), got -1",
            (X, W),
            dict(padding=-1),
        ),
        (ValueError, "must be 'same', an integer >= 0", (X, W), dict(padding=(1, 2, 3))),
        (
            ValueError,
            "prologue must be one of None, 'silu', 'relu', 'relu6', got 'gelu'",
            (X, W),
            dict(prologue="gelu"),
        ),
        (
            ValueError,
            "the padded x must not be smaller than the filter [3, 3], got [2, 6, 2, 5] with padding 0",
            (X[:, :, :2], W),
            {},
        ),
    ],
)
def test_bad_input(error, message, arguments, options):
    with pytest.raises(error, match=re.escape(message)) as raised:
        ops.depthwise_conv2d(*arguments, **options)
    assert str(raised.value).startswith("depthwise_conv2d: ")


@pytest.mark.parametrize(
    "error, message, arguments, options",
    [
        (ValueError, "pointwise_weight must have shape [O, 6, 1, 1], got [4, 5, 1, 1]", (torch.zeros(4, 5, 1, 1),), {}),
        (ValueError, "bias must have shape [4], got [6]", (torch.zeros(4, 6, 1, 1), B), {}),
        (
            TypeError,
            "pointwise_weight must have the dtype of x, float32, got float64",
            (torch.zeros(4, 6, 1, 1).double(),),
            {},
        ),
        (ValueError, "activation must be one of", (torch.zeros(4, 6, 1, 1),), dict(activation="gelu")),
    ],
)
def test_bad_input_of_separable(error, message, arguments, options):
    with pytest.raises(error, match=re.escape("depthwise_separable_conv2d: " + message)):
        ops.depthwise_separable_conv2d(X, W, *arguments, **options)


def test_raw_ops_guard_themselves():
    raw = torch.ops.effdet_fast
    with pytest.raises(RuntimeError, match="x must be dense"):
        raw.depthwise_conv(X.mT, W, None, 1, 1, 1, 5, 5, 0, False)
    with pytest.raises(RuntimeError, match="weight must be dense"):
        raw.depthwise_conv(X, W[:5], None, 1, 1, 1, 5, 5, 0, False)
    with pytest.raises(RuntimeError, match="of the dtype of the maps or of the arithmetic"):
        raw.depthwise_conv(X, W.bfloat16(), None, 1, 1, 1, 5, 5, 0, False)
    with pytest.raises(RuntimeError, match="no kernel for this filter"):
        raw.depthwise_conv(X, torch.zeros(6, 1, 7, 7), None, 1, 3, 3, 5, 5, 0, False)
    with pytest.raises(RuntimeError, match="grad must be dense"):
        raw.depthwise_conv_grad_weight(X[:1], X, 3, 1, 1, 1, 0, False, False, False)


def test_modules_load_what_they_replace():
    conv = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    module = effdet_nn.DepthwiseConv2d(8, 3, padding=1)
    module.load_state_dict(conv.state_dict(), strict=True)
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(module(x), conv(x))
    assert "prologue=None" in repr(module)

    separable = effdet_nn.SeparableConv2d(8, 4, prologue="silu")
    assert set(separable.state_dict()) == {"conv_dw.weight", "conv_pw.weight", "conv_pw.bias"}
    expected = separable.conv_pw(F.conv2d(F.silu(x), separable.conv_dw.weight, padding=1, groups=8))
    torch.testing.assert_close(separable(x), expected)


def test_initialization_is_that_of_conv2d():
    torch.manual_seed(3)
    conv = nn.Conv2d(8, 8, 5, groups=8)
    torch.manual_seed(3)
    module = effdet_nn.DepthwiseConv2d(8, 5)
    assert torch.equal(conv.weight, module.weight) and torch.equal(conv.bias, module.bias)


@pytest.mark.parametrize("stride", [1, 2])
def test_from_conv2d(stride):
    same = Conv2dSame(8, 8, 3, stride=stride, groups=8, bias=False).eval()
    module = effdet_nn.DepthwiseConv2d.from_conv2d(same, prologue="silu")
    assert module.weight is same.weight and module.bias is None and not module.training
    x = torch.randn(2, 8, 7, 6)
    torch.testing.assert_close(module(x), same(F.silu(x)))
    for padding in ("same", "valid", 1, (2, 0)):
        if padding == "same" and stride == 2:
            continue
        conv = nn.Conv2d(8, 8, (3, 5), stride=stride, padding=padding, groups=8)
        torch.testing.assert_close(effdet_nn.DepthwiseConv2d.from_conv2d(conv)(x), conv(x))


def test_from_conv2d_refuses():
    with pytest.raises(ValueError, match="one filter per channel, got 8 inputs, 8 outputs, 4 groups"):
        effdet_nn.DepthwiseConv2d.from_conv2d(nn.Conv2d(8, 8, 3, groups=4))
    with pytest.raises(ValueError, match="padding_mode must be 'zeros', got 'reflect'"):
        effdet_nn.DepthwiseConv2d.from_conv2d(nn.Conv2d(8, 8, 3, groups=8, padding_mode="reflect"))
    with pytest.raises(TypeError, match="conv must be an nn.Conv2d, got Linear"):
        effdet_nn.DepthwiseConv2d.from_conv2d(nn.Linear(8, 8))
