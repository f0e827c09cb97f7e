"""Squeeze-and-excite on every backend, against a float64 oracle and against PyTorch and timm."""

import pytest
import torch
import torch.nn.functional as F

from effdet_fast.nn import SqueezeExcite
from effdet_fast.ops import squeeze_excite, squeeze_excite_reference
from tests.checks import (
    ACTIVATIONS,
    DTYPES,
    LAYOUTS,
    all_equal,
    assert_same_in_any_order,
    assert_same_in_every_run,
    random_map,
    with_gradients,
)
from tests.ops.accuracy import assert_layer_accurate, guarded

GATES = [name for name in ACTIVATIONS if name]
# One pixel, one channel, fewer channels than lanes, channels that fill vectors or not, more than one block is wide.
SHAPES = [(7, 3, 1, 1), (2, 1, 5, 7), (1, 16, 2, 2), (2, 24, 13, 5), (2, 130, 3, 5), (1, 264, 2, 3)]


def make(shape, dtype, device, layout="nchw"):
    """x, the gradient of y, and the four parameters, in float32 for half precision."""
    channels, squeezed = shape[1], max(1, shape[1] // 4)
    x, grad = (random_map(shape, dtype, device, layout == "nhwc", mean) for mean in (0.5, 0.0))
    weights = [
        torch.randn(squeezed, channels, 1, 1, dtype=torch.float64) / max(channels, 1) ** 0.5,
        torch.randn(squeezed, dtype=torch.float64),
        torch.randn(channels, squeezed, 1, 1, dtype=torch.float64) / squeezed**0.5,
        torch.randn(channels, dtype=torch.float64),
    ]
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    return x, grad, *(t.to(parameters).to(device) for t in weights)


def exact(x, grad, *weights, activation="silu"):
    wide = [t.double() for t in (x, *weights)]
    return with_gradients(squeeze_excite_reference, wide, grad=grad, activation=activation)


def pytorch(x, reduce_weight, reduce_bias, expand_weight, expand_bias, activation="silu"):
    """As one writes it in PyTorch, in the dtype of x."""
    weights = [t.to(x.dtype) for t in (reduce_weight, reduce_bias, expand_weight, expand_bias)]
    reduced = ACTIVATIONS[activation](F.conv2d(x.mean((2, 3), keepdim=True), *weights[:2]))
    return x * F.conv2d(reduced, *weights[2:]).sigmoid()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_float64(backend, dtype, shape, layout):
    for activation in GATES if shape == (2, 24, 13, 5) else ("silu",):
        x, grad, *weights = make(shape, dtype, backend.device, layout)
        results = with_gradients(squeeze_excite, (guarded(x), *weights), grad=guarded(grad), activation=activation)
        peer = with_gradients(pytorch, (x, *weights), grad=grad, activation=activation)
        assert_layer_accurate(results, exact(x, grad, *weights, activation=activation), peer, x, grad, scale=1.0)
        assert results[0].dtype == results[1].dtype == dtype
        if backend.name != "reference":
            assert results[0].stride() == results[1].stride() == x.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_aligned_channels_fill_vectors(native_backend, dtype):
    """The test above reads misaligned views; here 16-byte accesses."""
    for layout in LAYOUTS:
        x, grad, *weights = make((2, 24, 4, 6), dtype, native_backend.device, layout)
        results, peer = (with_gradients(f, (x, *weights), grad=grad) for f in (squeeze_excite, pytorch))
        assert_layer_accurate(results, exact(x, grad, *weights), peer, x, grad, scale=1.0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [40, 7])
def test_rows_of_several_parts(native_backend, layout, channels):
    size = (190, 200) if native_backend.name == "cpu" else (50, 45) if layout == "nchw" else (39, 40)
    x, grad, *weights = make((2, channels, *size), torch.float32, native_backend.device, layout)
    results = with_gradients(squeeze_excite, (x, *weights), grad=grad)
    assert_layer_accurate(results, exact(x, grad, *weights), None, x, grad, scale=1.0)


def test_matrices_of_several_threads_and_blocks(native_backend):
    x, grad, *weights = make((9, 300, 1, 2), torch.float32, native_backend.device)
    results = with_gradients(squeeze_excite, (x, *weights), grad=grad)
    assert_layer_accurate(results, exact(x, grad, *weights), None, x, grad, scale=1.0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_means_of_five_million_pixels(layout, dtype):
    x = (torch.randn(1, 2, 2400, 2100) * 3 + 7).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    weights = torch.ones(1, 2, 1, 1), None, torch.ones(2, 1, 1, 1), None
    _, kept = torch.ops.effdet_fast.squeeze_excite(x, *weights, 1, layout == "nhwc")
    torch.testing.assert_close(kept[:2].double(), x.double().mean((2, 3))[0], rtol=2e-7, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", GATES)
def test_equals_pytorch(backend, layout, activation):
    x, grad, *weights = make((3, 10, 6, 7), torch.float32, backend.device, layout)
    ours = with_gradients(squeeze_excite, (x, *weights), grad=grad, activation=activation)
    theirs = with_gradients(pytorch, (x, *weights), grad=grad, activation=activation)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_empty(backend):
    for shape in ((0, 3, 4, 5), (2, 0, 4, 5)):
        x, grad, *weights = make(shape, torch.float32, backend.device)
        results = with_gradients(squeeze_excite, (x, *weights), grad=grad)
        assert results[0].shape == results[1].shape == x.shape
        assert not any(gradient.any() for gradient in results[2:])


def test_squeezed_to_nothing(backend):
    """The gate is the bias of the expansion."""
    x, grad, *_, bias = make((2, 8, 3, 4), torch.float32, backend.device)
    weights = x.new_zeros(0, 8, 1, 1), x.new_zeros(0), x.new_zeros(8, 0, 1, 1), bias
    y, grad_x, *_, grad_bias = with_gradients(squeeze_excite, (x, *weights), grad=grad)
    gate = bias.sigmoid()[:, None, None]
    torch.testing.assert_close(y, x * gate)
    torch.testing.assert_close(grad_x, grad * gate)
    torch.testing.assert_close(grad_bias, (grad * x * gate * (1 - gate)).sum((0, 2, 3)), rtol=1e-5, atol=1e-5)


def test_without_biases(backend):
    x, grad, reduce, _, expand, _ = make((2, 8, 3, 4), torch.float32, backend.device)
    zeros = torch.zeros(2, device=x.device), torch.zeros(8, device=x.device)
    leaf = x.detach().requires_grad_()
    y = squeeze_excite(leaf, reduce, None, expand, None)
    expected = with_gradients(pytorch, (x, reduce, zeros[0], expand, zeros[1]), grad=grad)
    torch.testing.assert_close(y, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(y, leaf, grad)[0], expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["silu", "relu"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(backend, activation, layout):
    x, _, *weights = make((2, 5, 2, 3), torch.float64, backend.device, layout)
    leaves = [t.requires_grad_() for t in (x, *weights)]
    assert torch.autograd.gradcheck(lambda *t: squeeze_excite(*t, activation=activation), leaves)


def test_second_derivative(native_backend):
    x, _, *weights = make((2, 3, 2, 2), torch.float64, native_backend.device)
    leaves = [t.requires_grad_() for t in (x, *weights)]
    assert torch.autograd.gradgradcheck(squeeze_excite, leaves)


@pytest.mark.parametrize("wanted", range(5))
def test_only_the_gradients_wanted(native_backend, wanted):
    x, grad, *weights = make((2, 8, 4, 5), torch.float32, native_backend.device)
    whole = with_gradients(squeeze_excite, (x, *weights), grad=grad)[1:]
    leaves = [t.detach().requires_grad_(i == wanted) for i, t in enumerate((x, *weights))]
    squeeze_excite(*leaves).backward(grad)
    for i, (leaf, expected) in enumerate(zip(leaves, whole, strict=True)):
        assert torch.equal(leaf.grad, expected) if i == wanted else leaf.grad is None


def test_second_backward_and_scaled_upstream(native_backend):
    x, grad, *weights = make((3, 8, 5, 5), torch.float32, native_backend.device)
    x.requires_grad_()
    y = squeeze_excite(x, *weights)
    first, second = (torch.autograd.grad(y, x, grad, retain_graph=True)[0] for _ in range(2))
    (scaled,) = torch.autograd.grad(y, x, grad * 1024)
    assert torch.equal(first, second) and torch.equal(scaled, first * 1024)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [3, 80])
def test_same_bits_every_time(native_backend, layout, channels):
    """Also with another number of threads."""
    shape = (2, channels, 12, 11) if native_backend.name == "emulated" else (2, channels, 120, 110)
    x, grad, *weights = make(shape, torch.float32, native_backend.device, layout)
    repeats = 3 if native_backend.name == "emulated" else 20
    assert_same_in_every_run(lambda: with_gradients(squeeze_excite, (x, *weights), grad=grad), repeats)


@pytest.mark.parametrize("seed", [2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_order_of_the_threads_does_not_matter(seed, layout):
    x, grad, *weights = make((2, 40, 20, 14), torch.float32, "cpu", layout)
    assert_same_in_any_order(lambda: with_gradients(squeeze_excite, (x, *weights), grad=grad), (1, seed))


def test_strided_parameters_give_the_same(native_backend):
    x, grad, *weights = make((2, 8, 3, 4), torch.float32, native_backend.device)
    strided = [torch.stack([t, t], dim=-1)[..., 0] for t in weights]
    assert not any(t.is_contiguous() for t in strided)
    assert all_equal(*(with_gradients(squeeze_excite, (x, *w), grad=grad) for w in (strided, weights)))


def test_strided_input_gives_the_same(backend):
    x, grad, *_ = make((3, 12, 6, 8), torch.float32, backend.device)
    _, _, *weights = make((3, 6, 6, 8), torch.float32, backend.device)
    for view in (
        lambda t: t[:, ::2],
        lambda t: t[:, 1:7, ::2],
        lambda t: t.transpose(2, 3)[:, :6],
        lambda t: t[:, 6:].flip(3),
        lambda t: t.to(memory_format=torch.channels_last)[:, 3:9],
    ):
        mine = with_gradients(squeeze_excite, (view(x), *weights), grad=view(grad))
        expected = with_gradients(squeeze_excite, (view(x).clone(), *weights), grad=view(grad).clone())
        for a, b in zip(mine, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    x = x[:, :6].contiguous()
    ours, theirs = (
        with_gradients(f, (x, *weights), grad=grad[:1, :1, :1, :1].expand_as(x)) for f in (squeeze_excite, pytorch)
    )
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-5)


def test_nan_stays_in_its_image(backend):
    x, _, *weights = make((3, 8, 4, 4), torch.float32, backend.device)
    x[1, 2, 3, 0] = float("nan")
    y = squeeze_excite(x, *weights)
    assert y[1].isnan().all() and not y[[0, 2]].isnan().any()


def test_gates_far_out_are_open_or_shut(backend):
    x, grad, reduce, reduce_bias, expand, _ = make((2, 8, 4, 4), torch.float32, backend.device)
    bias = torch.tensor([200.0, -200.0] * 4, device=x.device)
    y, grad_x, *rest = with_gradients(squeeze_excite, (x, reduce, reduce_bias, expand, bias), grad=grad)
    assert torch.equal(y[:, ::2], x[:, ::2]) and torch.equal(grad_x[:, ::2], grad[:, ::2])
    assert y[:, 1::2].abs().max() < 1e-30 and all(t.isfinite().all() for t in (grad_x, *rest))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("given", ["float32", "half"])
def test_autocast(backend, dtype, given):
    """In and out in half precision; the matrix products of the means and gates stay in float32."""
    x, grad, *weights = make((2, 16, 5, 5), torch.float32, backend.device)
    x = x if given == "float32" else x.to(dtype)
    leaves = [t.detach().requires_grad_() for t in (x, *weights)]
    with torch.autocast(backend.device.type, dtype):
        y = squeeze_excite(*leaves)
    results = [y.detach(), *torch.autograd.grad(y, leaves, grad.to(dtype), retain_graph=True)]
    if backend.name != "reference":  # whose backward is PyTorch's
        with torch.autocast(backend.device.type, dtype):
            inside = torch.autograd.grad(y, leaves, grad.to(dtype))
        assert all_equal(results[1:], inside)
    assert [r.dtype for r in results] == [dtype, x.dtype, *(torch.float32,) * 4]
    expected = exact(x.to(dtype), grad.to(dtype), *weights)
    eps = torch.finfo(dtype).eps
    for mine, wanted in zip(results[:2], expected[:2], strict=True):
        torch.testing.assert_close(mine.double(), wanted, rtol=eps, atol=eps)
    for mine, wanted in zip(results[2:], expected[2:], strict=True):
        torch.testing.assert_close(mine.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_parameters_in_half_precision(backend, dtype):
    x, grad, *weights = make((2, 8, 5, 5), dtype, backend.device)
    weights = [t.to(dtype) for t in weights]
    results = with_gradients(squeeze_excite, (x, *weights), grad=grad)
    assert all(r.dtype == dtype for r in results)
    for mine, wanted in zip(results, exact(x, grad, *weights), strict=True):
        torch.testing.assert_close(mine.double(), wanted, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(device, layout):
    x, grad, *weights = make((2, 3, 4, 5), torch.float32, device, layout)
    channels_last, ops = layout == "nhwc", torch.ops.effdet_fast
    for given in (weights, [weights[0], None, weights[2], None]):
        torch.library.opcheck(ops.squeeze_excite.default, (x, *given, 1, channels_last))
    _, kept = ops.squeeze_excite(x, *weights, 1, channels_last)
    for needs in ([True] * 5, [False, True, False, False, True]):
        given = (grad, x, weights[0], weights[2], kept, 1, channels_last, needs)
        torch.library.opcheck(ops.squeeze_excite_backward.default, given)


@pytest.mark.compiles
def test_compiles_without_a_break(device):
    compiled = torch.compile(squeeze_excite, fullgraph=True)
    for layout in LAYOUTS:
        x, grad, *weights = make((2, 8, 5, 6), torch.float32, device, layout)
        ours, eager = (with_gradients(f, (x, *weights), grad=grad) for f in (compiled, squeeze_excite))
        for mine, other in zip(ours, eager, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
            assert mine.stride() == other.stride()


def test_the_module_is_timms(backend):
    from timm.models._efficientnet_blocks import SqueezeExcite as Peer

    peer = Peer(16, rd_channels=4, act_layer=torch.nn.SiLU).to(backend.device)
    module = SqueezeExcite(16, 4).to(backend.device)
    assert [(k, v.shape) for k, v in module.state_dict().items()] == [
        (k, v.shape) for k, v in peer.state_dict().items()
    ]
    module.load_state_dict(peer.state_dict())
    x, grad, *_ = make((2, 16, 6, 5), torch.float32, backend.device, "nhwc")
    results = []
    for owner in (module, peer):
        leaf = x.clone().requires_grad_()
        y = owner(leaf)
        results.append([y.detach(), *torch.autograd.grad(y, [leaf, *owner.parameters()], grad)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_keeps_only_its_input_and_what_belongs_to_channels_for_the_backward_pass():
    module, x = SqueezeExcite(8, 2, "relu6"), torch.randn(2, 8, 16, 16, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(x)
    large = [t for t in kept if t.numel() > 40]
    assert len(large) == 1 and large[0].data_ptr() == x.data_ptr()
    assert "activation='relu6'" in repr(module)


GIVEN = dict(
    x=torch.zeros(2, 8, 4, 5),
    reduce_weight=torch.zeros(3, 8, 1, 1),
    reduce_bias=torch.zeros(3),
    expand_weight=torch.zeros(8, 3, 1, 1),
    expand_bias=torch.zeros(8),
)
ERRORS = [
    (dict(x=[1.0]), TypeError, "x must be a Tensor, got list"),
    (dict(x=GIVEN["x"].long()), TypeError, "x must be float16, bfloat16, float32 or float64, got int64"),
    (dict(x=GIVEN["x"][0]), ValueError, r"x must have shape \[N, C, H, W\] with at least one pixel, got \[8, 4, 5\]"),
    (dict(x=GIVEN["x"][:, :, :0]), ValueError, r"x must have shape .* one pixel, got \[2, 8, 0, 5\]"),
    (dict(activation="gelu"), ValueError, "activation must be one of 'silu', 'relu', 'relu6', got 'gelu'"),
    (dict(activation=None), ValueError, "activation must be one of 'silu', 'relu', 'relu6', got None"),
    (dict(reduce_weight=None), TypeError, "reduce_weight must be a Tensor, got NoneType"),
    (
        dict(reduce_weight=torch.zeros(3, 7, 1, 1)),
        ValueError,
        r"reduce_weight must have shape \[R, 8, 1, 1\], got \[3, 7, 1, 1\]",
    ),
    (dict(reduce_bias=torch.zeros(4)), ValueError, r"reduce_bias must have shape \[3\], got \[4\]"),
    (
        dict(expand_weight=torch.zeros(8, 3)),
        ValueError,
        r"expand_weight must have shape \[8, 3, 1, 1\], got \[8, 3\]",
    ),
    (
        dict(expand_bias=torch.zeros(8).double()),
        TypeError,
        "expand_bias must have dtype float32 for this x, got float64",
    ),
    (
        dict(x=GIVEN["x"].half(), expand_bias=torch.zeros(8).bfloat16()),
        TypeError,
        "expand_bias must have dtype float16 or float32 for this x, got bfloat16",
    ),
    (
        dict(expand_bias=torch.zeros(8, device="meta")),
        ValueError,
        "expand_bias must be on the device of x, cpu, got meta",
    ),
]


@pytest.mark.parametrize("change,error,message", ERRORS, ids=[m[:34] for _, _, m in ERRORS])
def test_bad_input(change, error, message):
    with pytest.raises(error, match=f"squeeze_excite: {message}"):
        squeeze_excite(**(GIVEN | change))
