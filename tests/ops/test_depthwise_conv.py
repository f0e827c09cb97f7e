"""Values and gradients of the depthwise convolution on every backend, against PyTorch in float64 and timm's padding."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.layers.padding import pad_same

from effdet_fast import ops
from tests.checks import ACTIVATIONS, all_equal, random_map, with_gradients
from tests.ops.accuracy import assert_convolved

pytestmark = pytest.mark.usefixtures("one_thread")

HALF = (torch.float16, torch.bfloat16)


def formula(x, weight, bias, stride, padding, prologue):
    """Written with PyTorch and timm's padding only."""
    x = ACTIVATIONS[prologue](x)
    if padding == "same":
        x, padding = pad_same(x, list(weight.shape[2:]), [stride, stride]), 0
    elif isinstance(padding, tuple):
        x, padding = F.pad(x, padding), 0
    return F.conv2d(x, weight, bias, stride, padding, groups=x.shape[1])


def convolved(x, weight, bias, stride, padding, prologue):
    return ops.depthwise_conv2d(x, weight, bias, stride, padding, prologue=prologue)


def make(size, kernel, dtype, device, channels_last):
    x = random_map(size, dtype, device, channels_last, deviation=3.0)
    filters = torch.randn(size[1], 1, kernel, kernel, device=device), torch.randn(size[1], device=device)
    return [x, *(t.to(dtype) for t in filters)]


def check(backend, size, kernel, stride, padding, prologue=None, dtype=torch.float32, channels_last=True, inputs=None):
    inputs = inputs or make(size, kernel, dtype, backend.device, channels_last)
    call = (stride, padding, prologue)
    wide = [t.double() for t in inputs]
    grad = torch.randn_like(formula(*wide, *call)).to(dtype).double()
    expected = with_gradients(formula, wide, *call, grad=grad)
    actual = with_gradients(convolved, inputs, *call, grad=grad)
    in_half = with_gradients(formula, inputs, *call, grad=grad) if dtype in HALF else expected
    assert all(t.dtype == dtype for t in actual)
    assert_convolved(actual, expected, in_half)
    return actual


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kernel, stride", itertools.product((3, 5), (1, 2)))
@pytest.mark.parametrize("channels", [1, 3, 7, 16, 40])
def test_same_padding_over_odd_sizes(backend, channels, kernel, stride, channels_last):
    sizes = [(1, 1), (2, 13), (5, 2), (13, 7)] if channels != 40 else [(5, 13)]
    for height, width in sizes:
        check(backend, (2, channels, height, width), kernel, stride, "same", channels_last=channels_last)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("channels, size", [(88, (13, 13)), (160, (7, 5)), (600, (5, 3))])
@pytest.mark.parametrize("kernel, stride", itertools.product((3, 5), (1, 2)))
def test_many_channels(native_backend, channels, size, kernel, stride, channels_last):
    if native_backend.name == "emulated" and kernel == 3:
        pytest.skip("the larger filter shows the same on the slow emulation")
    check(native_backend, (2, channels, *size), kernel, stride, "same", "silu", channels_last=channels_last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("prologue", [None, "silu", "relu", "relu6"])
def test_dtypes_and_prologues(backend, prologue, channels_last, dtype):
    for kernel, stride in ((3, 1), (3, 2), (5, 1), (5, 2)):
        check(backend, (2, 10, 9, 11), kernel, stride, "same", prologue, dtype, channels_last)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("padding", [0, 1, 4, (2, 0), (0, 3, 1, 0), (7, 0, 0, 9)])
@pytest.mark.parametrize("kernel, stride", [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_every_kind_of_padding(backend, padding, kernel, stride, channels_last):
    pair = padding if padding != (2, 0) else (0, 0, 2, 2)
    inputs = make((1, 6, 6, 8), kernel, torch.float32, backend.device, channels_last)
    call = with_gradients(ops.depthwise_conv2d, inputs, stride, padding)
    for a, e in zip(call, check(backend, (1, 6, 6, 8), kernel, stride, pair, inputs=inputs), strict=True):
        assert a.shape == e.shape
    assert torch.equal(call[0], ops.depthwise_conv2d(*inputs, stride, pair))


@pytest.mark.parametrize("channels_last", [False, True])
def test_wide_rows_take_every_tile(backend, channels_last):
    """Rows long enough for the widest tiles, several ranges of rows, and leftovers of each."""
    height = 36 if backend.name == "emulated" else 70
    for kernel, stride, width in ((3, 1, 83), (5, 1, 70), (5, 2, 139), (3, 2, 150)):
        if backend.name == "emulated" and stride == 2:
            width = 40
        check(
            backend,
            (1, 9 if channels_last else 2, height, width),
            kernel,
            stride,
            "same",
            "silu",
            channels_last=channels_last,
        )


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kernel, stride", itertools.product((3, 5), (1, 2)))
def test_every_width_and_vectors_with_a_rest(native_backend, kernel, stride, channels_last):
    """Tiles of one, four and eight columns that overlap, of one or two rows; strips that read their neighbors; channels beyond
    whole vectors."""
    if native_backend.name == "emulated":
        pytest.skip("about the tiles of the CPU kernels")
    for width in (3, 4, 5, 6, 7, 8, 9, 12, 15, 20):
        for channels, height in ((8, 3), (11, 3), (16, 6)):
            check(native_backend, (1, channels, height, width), kernel, stride, "same", channels_last=channels_last)
    check(native_backend, (1, 160, 19, 41), kernel, stride, (3, 1, 0, 2), channels_last=channels_last)
    check(native_backend, (1, 8, 5, 9), kernel, stride, (6, 7, 0, 8), "silu", torch.bfloat16, channels_last)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_half_precision_number_is_read_and_rounded_as_pytorch_does(native_backend, channels_last, dtype):
    if native_backend.name == "emulated":
        pytest.skip("too large for the emulation")
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    weight = torch.zeros(8, 1, 3, 3, dtype=dtype)
    weight[:, 0, 1, 1] = torch.tensor([1, 1.37, 3e-4, 900, -1, -2.5, 7e-5, 1 / 3], dtype=dtype)
    if channels_last:
        x = every.view(-1, 1, 1, 8).permute(0, 3, 1, 2)
    else:  # with neighbors, which must be finite
        x = torch.where(every.isfinite(), every, 0).view(-1, 8, 1, 16)
    x, weight = x.to(native_backend.device), weight.to(native_backend.device)
    expected = (x.float() * weight[:, :, 1, 1].float().view(1, 8, 1, 1)).to(dtype)
    actual = ops.depthwise_conv2d(x, weight, None, 1, "same")
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", [3, 5])
def test_rows_of_whole_vectors_have_the_same_bits_at_any_address(native_backend, kernel, dtype):
    """In NCHW four columns are one vector where rows are aligned and as long as the output's, else they are read one by one."""
    pad, device = kernel // 2, native_backend.device
    for width, prologue, padding in ((4, None, "same"), (8, "silu", (pad, pad, 0, 3)), (20, "relu6", "same")):
        x, weight, bias = make((2, 3, 6, width), kernel, dtype, device, False)
        check(native_backend, None, kernel, 1, padding, prologue, dtype, inputs=[x, weight, bias])
        convolve = partial(ops.depthwise_conv2d, stride=1, padding=padding, prologue=prologue)
        misaligned = torch.full((x.numel() + 9,), float("nan"), dtype=dtype, device=device)[3:-6].view_as(x).copy_(x)
        assert all_equal(*(with_gradients(convolve, [data, weight, bias]) for data in (misaligned, x)))
    for left in (0, kernel - 1):  # rows as long as the output's, but not under them
        padding = (left, kernel - 1 - left, 1, 1)
        check(native_backend, (1, 2, 5, 8), kernel, 1, padding, dtype=dtype, channels_last=False)


@pytest.mark.parametrize("channels_last", [False, True])
def test_more_chunks_than_one_block_adds(native_backend, channels_last):
    check(native_backend, (1, 2, 140, 124), 3, 1, "same", channels_last=channels_last)


def test_more_blocks_than_each_have_a_counter(native_backend):
    check(native_backend, (1, 130, 32, 33), 3, 1, "same", channels_last=False)


@pytest.mark.parametrize(
    "call",
    [
        dict(kernel=(7, 7), padding="same"),
        dict(kernel=(9, 9), padding="same", stride=2),
        dict(kernel=(3, 3), padding="same", dilation=2),
        dict(kernel=(3, 3), padding="same", stride=3),
        dict(kernel=(3, 5), padding=(2, 1, 0, 1), stride=(1, 2)),
        dict(kernel=(1, 1)),
        dict(kernel=(3, 3), padding=1, multiplier=2),
    ],
    ids=str,
)
def test_what_has_no_kernel_runs_through_pytorch(backend, call):
    call = dict(call)
    kernel, multiplier = call.pop("kernel"), call.pop("multiplier", 1)
    x = torch.randn(2, 6, 11, 12, device=backend.device)
    weight, bias = (
        torch.randn(6 * multiplier, 1, *kernel, device=backend.device),
        torch.randn(6 * multiplier, device=backend.device),
    )
    stride, dilation, padding = call.get("stride", 1), call.get("dilation", 1), call.get("padding", 0)
    padded = F.silu(x)
    if padding == "same":
        padded = pad_same(padded, list(kernel), [stride] * 2, [dilation] * 2)
    elif padding:
        padded = F.pad(padded, padding if isinstance(padding, tuple) else (padding,) * 4)
    expected = F.conv2d(padded, weight, bias, stride, 0, dilation, groups=6)
    torch.testing.assert_close(ops.depthwise_conv2d(x, weight, bias, prologue="silu", **call), expected)
    torch.testing.assert_close(ops.depthwise_conv2d_reference(x, weight, bias, prologue="silu", **call), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("view", ["offset", "channels", "columns", "transposed", "expanded"])
def test_views_into_nan(backend, view, dtype):
    """Any strides are accepted, and nothing outside the view is read: it is NaN there."""
    nan = torch.full((2, 24, 12, 12), float("nan"), dtype=dtype, device=backend.device)
    channels_last = view in ("offset", "channels")
    if channels_last:
        nan = nan.to(memory_format=torch.channels_last)
    if view == "offset":
        flat = torch.full((2 * 8 * 9 * 9 + 9,), float("nan"), dtype=dtype, device=backend.device)
        x = flat[3:-6].view(2, 9, 9, 8).permute(0, 3, 1, 2)
    else:
        x = nan[:, 5:13, 2:11, 1:10]
    x.copy_(torch.randn_like(x))
    if view == "transposed":
        x = x.mT
    if view == "expanded":
        x = x[:, :1].expand(2, 8, 9, 9)
    weight = torch.full((8, 2, 5, 5), float("nan"), dtype=dtype, device=backend.device)[:, :1]
    bias = torch.full((16,), float("nan"), dtype=dtype, device=backend.device)[::2]
    weight.copy_(torch.randn_like(weight)), bias.copy_(torch.randn_like(bias))
    for stride in (1, 2):
        y, *_ = check(backend, None, 5, stride, "same", "silu", dtype, inputs=[x, weight, bias])
        assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_format_is_kept(backend, dtype):
    for size in ((2, 8, 9, 10), (2, 8, 1, 1), (1, 8, 4, 1), (2, 1, 4, 4)):
        for channels_last in (False, True):
            memory_format = torch.channels_last if channels_last else torch.contiguous_format
            x, weight, bias = make(size, 3, dtype, backend.device, channels_last)
            y, grad_x, *_ = with_gradients(ops.depthwise_conv2d, [x, weight, bias], 1, 1)
            assert y.is_contiguous(memory_format=memory_format) and grad_x.is_contiguous(memory_format=memory_format)
            if size[1] > 1 and backend.name != "reference":
                assert y.stride() == x.contiguous(memory_format=memory_format).stride() == x.stride()


@pytest.mark.parametrize("size", [(0, 8, 5, 5), (2, 0, 5, 5)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_empty(backend, size, channels_last):
    x, weight, bias = make(size, 3, torch.float32, backend.device, channels_last)
    y, grad_x, grad_weight, grad_bias = with_gradients(ops.depthwise_conv2d, [x, weight, bias], 2, "same")
    assert y.shape == (size[0], size[1], 3, 3) and grad_x.shape == size
    assert torch.equal(grad_weight, torch.zeros_like(weight)) and torch.equal(grad_bias, torch.zeros_like(bias))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kernel, stride", itertools.product((3, 5), (1, 2)))
def test_not_finite_input_stays_where_the_filter_reaches(native_backend, kernel, stride, channels_last):
    """Vectors and tiles read more columns than a tap needs: what they read there must not leak, not even as 0 * inf."""
    x, weight, bias = make((1, 8, 12, 21), kernel, torch.float32, native_backend.device, channels_last)
    x[:, :, 5, -1] = float("inf")
    x[:, :, 7, 0] = float("nan")
    expected = with_gradients(formula, [x, weight, bias], stride, 0, None)
    actual = with_gradients(ops.depthwise_conv2d, [x, weight, bias], stride, 0)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kernel, stride", itertools.product((3, 5), (1, 2)))
def test_not_finite_input_beside_outputs_that_are_not_there(native_backend, kernel, stride, channels_last):
    """In the image's first and last rows and columns, and beside ranges of rows and groups of columns, no tap may add 0 * inf."""
    for height, width in ((37, 7), (5, 6), (2, 9)):
        x, weight, bias = make((1, 4, height, width), kernel, torch.float32, native_backend.device, channels_last)
        for channel, (row, column) in enumerate(((0, 1), (-1, 2), (1, -1), (height // 2, 0))):
            x[:, channel, row, column] = float("inf")
        expected = with_gradients(formula, [x, weight, bias], stride, "same", None)
        actual = with_gradients(ops.depthwise_conv2d, [x, weight, bias], stride, "same")
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kernel, stride", itertools.product((3, 5), (1, 2)))
def test_weight_gradient_over_tiles_of_every_height(native_backend, kernel, stride, channels_last):
    """Tiles of a whole image, of many rows, and shorter than the filter; columns in groups and left over."""
    for height in (1, 2, 4, 5, 8, 33, 67):
        for padding in ("same", (1, 2, 4, 0)):
            check(native_backend, (2, 2, height, 10), kernel, stride, padding, channels_last=channels_last)


def test_weight_gradient_of_a_large_bf16_batch(native_backend):
    """More than a million terms with a mean far from zero: half precision sums would stop growing."""
    if native_backend.name == "emulated":
        pytest.skip("too large for the emulation")
    for channels_last, kernel in ((True, 3), (False, 5)):
        x = (torch.randn(16, 4, 256, 256, device=native_backend.device) + 2).bfloat16()
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        grad = (torch.randn_like(x, dtype=torch.float32) + 1).bfloat16()
        weight = torch.randn(4, 1, kernel, kernel, device=native_backend.device).bfloat16()
        bias = torch.zeros(4, device=native_backend.device).bfloat16()
        actual = with_gradients(ops.depthwise_conv2d, [x, weight, bias], 1, "same", grad=grad)
        expected = torch.nn.grad.conv2d_weight(x.double(), weight.shape, grad.double(), padding=kernel // 2, groups=4)
        for a, e in ((actual[2], expected), (actual[3], grad.double().sum((0, 2, 3)))):
            assert ((a.double() - e).abs() / e.abs()).max() < 2**-8  # one rounding to bfloat16
