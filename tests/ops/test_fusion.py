"""Weighted fusion on every backend: numbers, against a float64 oracle and against effdet, timm and PyTorch."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from effdet_fast.ops import (
    fast_normalized_fusion,
    fast_normalized_fusion_reference,
    weighted_fusion,
    weighted_fusion_reference,
)
from tests.checks import ACTIVATIONS, DTYPES, all_equal, random_map, with_gradients
from tests.ops.accuracy import assert_accurate, guarded

N, M, P = "none", "nearest", "max_pool"
# resampling, sizes of the inputs, size of the output
CASES = {
    "plain": ((N, N), ((5, 7), (5, 7)), (5, 7)),
    "plain, three": ((N, N, N), ((4, 5), (4, 5), (4, 5)), (4, 5)),
    "top down": ((N, M), ((6, 4), (3, 2)), (6, 4)),
    "top down, odd": ((N, M), ((5, 7), (3, 4)), (5, 7)),
    "bottom up": ((N, N, P), ((3, 4), (3, 4), (6, 8)), (3, 4)),
    "bottom up, odd": ((N, N, P), ((4, 3), (4, 3), (7, 5)), (4, 3)),
    "last level": ((N, P), ((4, 3), (8, 5)), (4, 3)),
    "one pixel": ((N, M, P), ((1, 1), (1, 1), (1, 2)), (1, 1)),
    "two sizes of nearest": ((M, P, N, M), ((2, 3), (9, 14), (5, 7), (9, 4)), (5, 7)),
    "nearest only": ((M, M), ((1, 2), (1, 2)), (4, 3)),
    "nearest shrinks": ((M, P), ((9, 8), (5, 4)), (3, 2)),
    "max_pool twice": ((P, P), ((6, 5), (5, 6)), (3, 3)),
}
OPTIONS = [("fast", "silu"), ("softmax", None), ("sum", "relu6"), ("fast", "relu"), ("softmax", "silu"), ("sum", None)]


def make(case, channels, dtype, device="cpu", batch=2, channels_last=False, weights_dtype=torch.float32):
    resample, sizes, out = CASES[case]
    xs = [random_map((batch, channels, *size), dtype, device, channels_last) for size in sizes]
    weights = torch.tensor([0.9, 1.3, -0.2, 0.4], dtype=weights_dtype, device=device)[: len(xs)]
    grad = random_map((batch, channels, *out), dtype, device)
    return xs, weights, grad, {"resample": resample, "size": out}


def exact(xs, weights, grad, **options) -> list[Tensor]:
    wide = [x.double() for x in xs], None if weights is None else weights.double()
    return with_gradients(weighted_fusion_reference, wide, grad=grad.double(), **options)


def eager(xs, weights, *, method, resample, size, activation, eps=1e-4):
    """The formula as effdet has it, in the dtype of the inputs."""
    nodes = []
    for x, how in zip(xs, resample, strict=True):
        if how == M:
            x = F.interpolate(x, size=size)
        elif how == P:
            x = F.max_pool2d(x, 3, 2, (x.shape[2] % 2, x.shape[3] % 2), ceil_mode=True)
        nodes.append(x)
    if method == "softmax":
        out = torch.stack(nodes, -1) * torch.softmax(weights.to(xs[0].dtype), 0)
    elif method == "fast":
        w = F.relu(weights.to(xs[0].dtype))
        out = torch.stack([x * w[i] / (w.sum() + eps) for i, x in enumerate(nodes)], -1)
    else:
        out = torch.stack(nodes, -1)
    return ACTIVATIONS[activation](out.sum(-1))


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("channels", [3, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_against_float64(backend, case, dtype, channels, channels_last):
    index = list(CASES).index(case)
    for misaligned, (method, activation) in zip((False, True, channels == 16), OPTIONS[index % 4 :][:3], strict=False):
        weights_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        xs, weights, grad, options = make(case, channels, dtype, backend.device, 2, channels_last, weights_dtype)
        xs = [guarded(x, 3 if misaligned else 8) for x in xs]
        weights = None if method == "sum" else guarded(weights)
        options |= {"method": method, "activation": activation}
        ours = with_gradients(weighted_fusion, (xs, weights), grad=grad, **options)
        peer = with_gradients(eager, (xs, weights), grad=grad, **options)
        # Every result is a sum of terms with both signs: of the size of the inputs (out), of the upstream gradients of a pixel's
        # children or windows (inputs), of all of them (weights).
        scales = [3.0, *[grad.abs().sum((2, 3), keepdim=True).double()] * len(xs), grad.abs().sum().double()]
        for i, (mine, true, other) in enumerate(zip(ours, exact(xs, weights, grad, **options), peer, strict=True)):
            assert mine.dtype == (weights.dtype if i > len(xs) else dtype)
            if i <= len(xs) and channels_last and backend.name != "reference":
                assert mine.is_contiguous(memory_format=torch.channels_last)
            assert_accurate(
                mine, true, other, scale=scales[i] if mine.dtype in (torch.float32, torch.float64) else None
            )


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    "batch,channels,sizes,resample",
    [
        (1, 40, [(9, 70), (5, 35), (18, 139)], (N, M, P)),  # rows longer than a segment, several blocks side by side
        (2, 3, [(64, 1), (1, 1)], (N, M)),
        (1, 2, [(1, 2500), (1, 7)], (N, M)),
        (1, 1100, [(2, 3), (4, 5)], (N, P)),  # more channels than a segment
        (
            1,
            1,
            [(2, 2602), (1, 1301), (3, 5203)],
            (N, M, P),
        ),  # several pieces of a row, in pairs, from outside on the left
        (1, 1, [(2, 1300), (3, 2600)], (N, P)),
    ],
)
def test_long_rows(native_backend, batch, channels, sizes, resample, channels_last, activation):
    xs = [torch.randn(batch, channels, *size, device=native_backend.device) for size in sizes]
    if channels_last:
        xs = [x.to(memory_format=torch.channels_last) for x in xs]
    weights, grad = torch.rand(len(xs), device=native_backend.device), torch.randn_like(xs[0])
    options = {"resample": resample, "activation": activation}
    ours = with_gradients(weighted_fusion, (xs, weights), grad=grad, **options)
    for mine, true in zip(ours, exact(xs, weights, grad, **options), strict=True):
        assert_accurate(mine, true, scale=grad.abs().sum((2, 3)).max().double())


@pytest.mark.parametrize("shape", [(601, 1001, 1, 1), (1, 1, 1, 560001), (1, 1, 1, 2200000)], ids=str)
def test_more_rows_or_columns_than_blocks(native_backend, shape):
    xs = [torch.randn(shape, device=native_backend.device) for _ in range(2)]
    weights, grad = torch.tensor([0.5, 2.0], device=native_backend.device), torch.randn_like(xs[0]) + 0.5
    ours = with_gradients(weighted_fusion, (xs, weights), grad=grad)
    for mine, true in zip(ours, exact(xs, weights, grad), strict=True):
        assert_accurate(mine, true, scale=grad.abs().max().double() if mine.dim() == 4 else grad.abs().sum().double())


def test_nearest_reads_the_exact_floor_for_any_ratio(backend):
    agrees = 0
    for n_in, n_out in itertools.product([1, 2, 3, 5, 7, 10, 41], [1, 2, 3, 4, 5, 7, 13, 82]):
        x = torch.arange(float(n_in), device=backend.device).view(1, 1, 1, n_in)
        zeros = torch.zeros(1, 1, n_out, n_out, device=backend.device)
        across = weighted_fusion([zeros[:, :, :1], x], method="sum", resample=(N, M))
        down = weighted_fusion([zeros[..., :1], x.transpose(2, 3)], method="sum", resample=(N, M))
        assert across.flatten().tolist() == down.flatten().tolist() == [i * n_in // n_out for i in range(n_out)]
        agrees += torch.equal(across, F.interpolate(x, size=(1, n_out)))
    assert agrees >= 50  # PyTorch rounds the ratio to float32 first, which now and then reads the pixel before


@pytest.mark.parametrize("kind", ["random", "ties", "nan", "infinite"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("place", [0, 1])
def test_max_pool_is_the_peers(backend, place, dtype, channels_last, kind):
    from timm.layers import create_pool2d

    pool = create_pool2d("max", 3, 2, padding="same")
    for h, w in itertools.product([1, 2, 3, 6, 7], [1, 2, 5, 8, 39, 70]):
        x = torch.randn(2, 8, h, w)
        if kind == "ties":
            x = torch.tensor([0.0, -0.0, 1.0])[torch.randint(0, 3, x.shape)]
        elif kind == "nan":
            x[torch.rand_like(x) < 0.3] = float("nan")
        elif kind == "infinite":
            x = torch.tensor([float("inf"), 0.0, 1.0])[torch.randint(0, 3, x.shape)]
        x = x.to(backend.device, dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        zeros = torch.zeros(2, 8, (h + 1) // 2, (w + 1) // 2, dtype=dtype, device=backend.device)
        grad = torch.randint(1, 50, zeros.shape, device=backend.device).to(
            dtype
        )  # sums of integers: exact in any order
        inputs, resample = ([x, zeros], (P, N)) if place == 0 else ([zeros, x], (N, P))
        out, *grads = with_gradients(weighted_fusion, (inputs, None), grad=grad, method="sum", resample=resample)
        expected, expected_grad = with_gradients(pool, (x,), grad=grad)
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(grads[place], expected_grad, rtol=0, atol=0)


@pytest.mark.parametrize("channels", [1, 8])
def test_max_pool_of_minus_infinity(backend, channels):
    x = torch.full((1, channels, 3, 3), -float("inf"), device=backend.device).to(memory_format=torch.channels_last)
    zeros, grad = (torch.full((1, channels, 2, 2), v, device=backend.device) for v in (0.0, 1.0))
    out, _, grad_x = with_gradients(weighted_fusion, ([zeros, x], None), grad=grad, method="sum", resample=(N, P))
    assert torch.equal(out, torch.full_like(out, -float("inf")))
    for of_channel in grad_x[0]:  # the first pixel of each window that is inside
        assert of_channel.flatten().tolist() == [1, 1, 0, 1, 1, 0, 0, 0, 0]


def test_silu_is_right_to_the_last_digits_over_its_range(backend):
    x = torch.cat([torch.linspace(-87, 87, 20011), torch.tensor([-0.0, 1e-30, 1e30, float("inf"), float("nan")])])
    inputs = [v.view(1, 1, 1, -1).to(backend.device) for v in (x, torch.zeros_like(x))]
    out, grad_x, _ = with_gradients(
        weighted_fusion, (inputs, None), grad=inputs[1] + 1, method="sum", activation="silu"
    )
    s = torch.sigmoid(x.double())
    finite = x.isfinite()
    for mine, true in ((out, x * s), (grad_x, s * (1 + x * (1 - s)))):
        mine = mine.flatten().cpu().double()
        # The gradient crosses zero at -1.28: there it is accurate to the size of its terms.
        error = (mine - true).abs() / true.abs().clamp(min=0.1 * s)
        assert error[finite].max() < 4e-6
        assert mine[-1].isnan()
    assert out.flatten()[-2] == float("inf")
    beyond = torch.full((1, 1, 1, 9), -1000.0, device=backend.device)
    assert weighted_fusion([beyond, beyond], method="sum", activation="silu").abs().max() < 1e-30


@pytest.mark.parametrize("weight_method,method", [("fastattn", "fast"), ("attn", "softmax"), ("sum", "sum")])
@pytest.mark.parametrize("size", [(8, 8), (5, 7)], ids=str)
@pytest.mark.parametrize("node", ["top down", "bottom up"])
def test_equals_effdet(backend, weight_method, method, size, node):
    FpnCombine = pytest.importorskip("effdet.efficientdet").FpnCombine
    down, up = (2 * size[0], 2 * size[1]), ((size[0] + 1) // 2, (size[1] + 1) // 2)
    sizes = [size, up] if node == "top down" else [size, size, down]
    resample = (N, M) if node == "top down" else (N, N, P)
    info = [{"num_chs": 16, "size": s} for s in sizes]
    combine = FpnCombine(info, 16, list(range(len(info))), size, pad_type="same", weight_method=weight_method)
    combine = combine.to(backend.device)
    weights = None
    if method != "sum":
        weights = combine.edge_weights.data = torch.tensor([0.7, 1.4, -0.3], device=backend.device)[: len(info)]
    xs = [torch.randn(2, 16, *s, device=backend.device) for s in sizes]
    grad = torch.randn(2, 16, *size, device=backend.device)

    def theirs(inputs, given):
        if given is None:
            return combine(inputs)
        return torch.func.functional_call(combine, {"edge_weights": given}, (inputs,))

    ours = with_gradients(weighted_fusion, (xs, weights), grad=grad, method=method, resample=resample)
    for mine, other in zip(ours, with_gradients(theirs, (xs, weights), grad=grad), strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-5, atol=2e-5)


def test_weights_are_normalized_in_float32(backend):
    """In half precision a peer rounds 1e-3 + 1e-4 to a sum that is off by 1 part in 2000."""
    xs = [torch.full((1, 1, 1, 1), 1024.0, dtype=torch.bfloat16, device=backend.device) for _ in range(2)]
    weights = torch.tensor([1e-3, 3e-3], device=backend.device)
    out = weighted_fusion(xs, weights)
    assert out.item() == torch.tensor(1024 * 4e-3 / (4e-3 + 1e-4)).bfloat16().item()


def test_negative_weights_have_no_part_and_no_gradient(backend):
    xs = [torch.randn(1, 4, 2, 2, device=backend.device) for _ in range(3)]
    weights = torch.tensor([-1.0, 2.0, 0.0], device=backend.device)
    out, *grads, grad_weights = with_gradients(weighted_fusion, (xs, weights), grad=torch.ones_like(xs[0]))
    torch.testing.assert_close(out, xs[1] * (2 / 2.0001))
    assert not grads[0].any() and not grads[2].any() and grad_weights[0] == 0 and grad_weights[2] == 0


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method,activation", [("fast", "silu"), ("softmax", None), ("sum", "silu")])
def test_gradcheck(backend, case, method, activation):
    xs, weights, _, options = make(case, 2, torch.float64, backend.device, batch=1, weights_dtype=torch.float64)
    weights = None if method == "sum" else weights.abs()
    leaves = [x.requires_grad_() for x in (xs if weights is None else [*xs, weights])]
    options |= {"method": method, "activation": activation}

    def function(*arguments):
        return weighted_fusion(arguments[: len(xs)], arguments[len(xs)] if weights is not None else None, **options)

    assert torch.autograd.gradcheck(function, leaves)


def test_second_derivative(native_backend):
    xs, weights, _, options = make("bottom up", 1, torch.float64, native_backend.device, 1, False, torch.float64)
    leaves = [x.requires_grad_() for x in [*xs, weights.abs()]]
    assert torch.autograd.gradgradcheck(
        lambda *args: weighted_fusion(args[:3], args[3], activation="silu", **options), leaves
    )


def test_fast_normalized_fusion_is_the_fast_method(backend):
    xs, weights, grad, options = make("top down", 8, torch.float32, backend.device)
    options |= {"activation": "relu", "eps": 0.1}
    ours = with_gradients(fast_normalized_fusion, (xs, weights), grad=grad, **options)
    same = with_gradients(weighted_fusion, (xs, weights), grad=grad, **options)
    reference = with_gradients(fast_normalized_fusion_reference, (xs, weights), grad=grad, **options)
    assert all_equal(ours, same)
    for mine, third in zip(ours, reference, strict=True):
        torch.testing.assert_close(mine, third, rtol=1e-5, atol=1e-5)
