"""Batch normalization with activation on every backend, against a float64 oracle and against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

from effdet_fast.ops import batch_norm_act, batch_norm_act_reference
from tests.checks import (
    ACTIVATIONS,
    DTYPES,
    LAYOUTS,
    assert_same_in_any_order,
    assert_same_in_every_run,
    random_map,
    with_gradients,
)
from tests.ops.accuracy import assert_layer_accurate, guarded

# One pixel, fewer channels than lanes, channels that fill vectors or not, planes in several pieces.
SHAPES = [(7, 3, 1, 1), (2, 1, 5, 7), (1, 16, 2, 2), (2, 24, 13, 5), (3, 40, 4, 4), (2, 130, 3, 5)]


def make(shape, dtype, device, layout="nchw", mean=0.5, deviation=2.0):
    x = random_map(shape, dtype, device, layout == "nhwc", mean, deviation)
    grad = random_map(shape, dtype, device, layout == "nhwc")
    weight, bias = torch.rand(shape[1], dtype=torch.float64) + 0.5, torch.randn(shape[1], dtype=torch.float64)
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    return x, grad, weight.to(parameters).to(device), bias.to(parameters).to(device)


def normalized(x, weight, bias, **options):
    return batch_norm_act(x, weight=weight, bias=bias, **options)


def exact(x, grad, weight, bias, **options):
    def reference(x, weight, bias, **options):
        return batch_norm_act_reference(x, weight=weight, bias=bias, **options)

    return with_gradients(reference, (x.double(), weight.double(), bias.double()), grad=grad, **options)


def pytorch(x, weight, bias, training, activation=None, eps=1e-5, running_mean=None, running_var=None):
    """As one writes it in PyTorch, in the dtype of x."""
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    running = (None, None) if running_mean is None else (running_mean.to(x.dtype), running_var.to(x.dtype))
    return ACTIVATIONS[activation](F.batch_norm(x, *running, weight, bias, training, 0.1, eps))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_against_float64(backend, dtype, shape, layout):
    for activation in ACTIVATIONS if shape == (2, 24, 13, 5) else ("silu",):
        x, grad, weight, bias = make(shape, dtype, backend.device, layout)
        options = dict(training=True, activation=activation, eps=1e-3)
        results = with_gradients(normalized, (guarded(x), weight, bias), grad=guarded(grad), **options)
        peer = with_gradients(pytorch, (x, weight, bias), grad=grad, **options)
        assert_layer_accurate(results, exact(x, grad, weight, bias, **options), peer, x, grad, scale=2.0)
        assert results[0].dtype == results[1].dtype == dtype
        if backend.name != "reference":
            assert results[0].stride() == results[1].stride() == x.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 24, 13, 5), (2, 7, 1, 1), (1, 3, 5, 5)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_running_statistics_against_float64(backend, dtype, shape, layout):
    x, grad, weight, bias = make(shape, dtype, backend.device, layout)
    running = dict(running_mean=bias / 3, running_var=weight * 3)
    for activation in ACTIVATIONS if shape[2] == 13 else ("relu6",):
        results = with_gradients(normalized, (x, weight, bias), grad=grad, **running, activation=activation)
        running64 = {name: values.double() for name, values in running.items()}
        expected = exact(x, grad, weight, bias, **running64, activation=activation)
        peer = with_gradients(pytorch, (x, weight, bias), grad=grad, training=False, **running, activation=activation)
        assert_layer_accurate(results, expected, peer, x, grad, scale=2.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_planes_of_several_pieces_and_many_pixels(native_backend, layout):
    shape = (2, 3, 40, 50) if native_backend.name == "emulated" else (2, 20, 190, 200)
    x, grad, weight, bias = make(shape, torch.float32, native_backend.device, layout)
    results = with_gradients(normalized, (x, weight, bias), grad=grad, training=True, activation="silu")
    expected = exact(x, grad, weight, bias, training=True, activation="silu")
    assert_layer_accurate(results, expected, None, x, grad, scale=2.0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_large_mean_costs_no_accuracy(backend, layout, dtype):
    """Mean 1000, deviation 1: a sum of squares in float32 would leave nothing of the variance."""
    x, *_ = make((4, 5, 9, 11), dtype, backend.device, layout, mean=1000.0, deviation=1.0)
    mean, var = torch.zeros(5, device=x.device), torch.ones(5, device=x.device)
    y = batch_norm_act(x, mean, var, training=True, momentum=1.0, activation="silu")
    x64 = x.double()
    torch.testing.assert_close(mean.double(), x64.mean((0, 2, 3)), rtol=3e-7, atol=0)
    torch.testing.assert_close(var.double(), x64.var((0, 2, 3)), rtol=2e-6, atol=0)
    expected = F.silu(F.batch_norm(x64, None, None, training=True))
    # A mean in float32 is itself off by up to 6e-5 after the reference's sums.
    tolerance = dict(rtol=0, atol=2e-4) if dtype == torch.float32 else dict(rtol=2**-8, atol=2e-4)
    torch.testing.assert_close(y.double(), expected, **tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_outlier_in_front_costs_no_accuracy(native_backend, layout):
    """A pivot that is an outlier would make all distances large."""
    x, *_ = make((2, 3, 24, 24), torch.float32, native_backend.device, layout)
    x[0, :, 0, 0] = 1e5
    mean, var = torch.zeros(3, device=x.device), torch.ones(3, device=x.device)
    batch_norm_act(x, mean, var, training=True, momentum=1.0)
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), x.double().var((0, 2, 3)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ten_million_values_a_channel(layout, dtype):
    x = (torch.randn(1, 2, 2400, 2100) * 3 + 7).repeat(2, 1, 1, 1).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    x.requires_grad_()
    mean, var, bias = torch.zeros(2), torch.ones(2), torch.zeros(2, requires_grad=True)
    y = batch_norm_act(x, mean, var, bias=bias, training=True, momentum=1.0)
    y.backward(torch.full_like(y, 1.0))
    x64 = x.detach().double()
    torch.testing.assert_close(mean.double(), x64.mean((0, 2, 3)), rtol=1e-7, atol=0)
    torch.testing.assert_close(var.double(), x64.var((0, 2, 3)), rtol=1e-6, atol=0)
    assert bias.grad.tolist() == [2 * 2400 * 2100] * 2


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_pytorch(backend, activation, layout):
    x, grad, weight, bias = make((3, 10, 6, 7), torch.float32, backend.device, layout)
    for training in (True, False):
        running = [(bias.clone(), weight.clone()) for _ in range(2)]
        given, options = (x, weight, bias), dict(training=training, activation=activation)
        ours, theirs = (
            with_gradients(function, given, grad=grad, **options, running_mean=m, running_var=v)
            for function, (m, v) in zip((normalized, pytorch), running, strict=True)
        )
        for mine, other in zip((*ours, *running[0]), (*theirs, *running[1]), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_empty(backend, training):
    for shape in ((0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5)):
        x, grad, weight, bias = make(shape, torch.float32, backend.device)
        running = dict(running_mean=bias.clone(), running_var=weight.clone())
        results = with_gradients(
            normalized, (x, weight, bias), grad=grad, training=training, activation="silu", **running
        )
        assert results[0].shape == results[1].shape == x.shape
        assert not results[2].any() and not results[3].any() and torch.equal(running["running_mean"], bias)


@pytest.mark.parametrize("missing", ["weight", "bias", "both"])
def test_without_weight_or_bias(backend, missing):
    x, _, weight, bias = make((2, 5, 3, 4), torch.float32, backend.device)
    weight, bias = None if missing != "bias" else weight, None if missing != "weight" else bias
    for training, running in ((True, (None, None)), (False, (torch.ones(5), torch.full((5,), 2.0)))):
        mean, var = (t if t is None else t.to(x.device) for t in running)
        leaf = x.detach().requires_grad_()
        y = batch_norm_act(leaf, mean, var, weight, bias, training, activation="relu")
        torch.testing.assert_close(y, F.relu(F.batch_norm(x, mean, var, weight, bias, training)), rtol=1e-5, atol=1e-5)
        y.sum().backward()


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(backend, activation, training, layout):
    x, _, weight, bias = make((2, 3, 2, 3), torch.float64, backend.device, layout)
    running = (None, None) if training else (bias.clone(), weight.clone())
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda x, w, b: batch_norm_act(x, *running, w, b, training, activation=activation), leaves
    )


@pytest.mark.parametrize("training", [True, False])
def test_second_derivative(native_backend, training):
    x, _, weight, bias = make((2, 2, 2, 2), torch.float64, native_backend.device)
    running = (None, None) if training else (bias.clone(), weight.clone())
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradgradcheck(
        lambda x, w, b: batch_norm_act(x, *running, w, b, training, activation="silu"), leaves
    )


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_only_the_gradients_wanted(native_backend, needed, training):
    x, grad, weight, bias = make((2, 3, 4, 5), torch.float32, native_backend.device)
    options = dict(training=training, running_mean=bias.clone(), running_var=weight.clone(), activation="silu")
    whole = with_gradients(normalized, (x, weight, bias), grad=grad, **options)[1:]
    leaves = [t.detach().requires_grad_(need) for t, need in zip((x, weight, bias), needed, strict=True)]
    options |= dict(running_mean=bias.clone(), running_var=weight.clone())
    batch_norm_act(leaves[0], weight=leaves[1], bias=leaves[2], **options).backward(grad)
    for leaf, need, expected in zip(leaves, needed, whole, strict=True):
        assert torch.equal(leaf.grad, expected) if need else leaf.grad is None


def test_second_backward_and_scaled_upstream(native_backend):
    x, grad, weight, bias = make((3, 8, 5, 5), torch.float32, native_backend.device)
    x.requires_grad_()
    y = batch_norm_act(x, weight=weight, bias=bias, training=True, activation="silu")
    first, second = (torch.autograd.grad(y, x, grad, retain_graph=True)[0] for _ in range(2))
    (scaled,) = torch.autograd.grad(y, x, grad * 1024)
    assert torch.equal(first, second) and torch.equal(scaled, first * 1024)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_every_time(native_backend, layout):
    """Whatever the number of threads; it decides whether NCHW goes channel by channel."""
    shape = (2, 3, 12, 11) if native_backend.name == "emulated" else (2, 3, 200, 190)
    x, grad, weight, bias = make(shape, torch.float32, native_backend.device, layout)
    repeats = 3 if native_backend.name == "emulated" else 20
    options = dict(grad=grad, training=True, activation="silu")
    assert_same_in_every_run(lambda: with_gradients(normalized, (x, weight, bias), **options), repeats)


@pytest.mark.parametrize("seed", [2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_order_of_the_threads_does_not_matter(seed, layout):
    x, grad, weight, bias = make((2, 40, 6, 5), torch.float32, "cpu", layout)
    options = dict(grad=grad, training=True, activation="silu")
    assert_same_in_any_order(lambda: with_gradients(normalized, (x, weight, bias), **options), (1, seed))


def test_strided_input_gives_the_same(backend):
    x, grad, weight, bias = make((3, 12, 6, 8), torch.float32, backend.device)
    options = dict(training=True, activation="silu")
    for view in (
        lambda t: t[:, ::2],
        lambda t: t[:, 1:7, ::2],
        lambda t: t.transpose(2, 3)[:, :6],
        lambda t: t[:, 6:].flip(3),
    ):
        mine, expected = (
            with_gradients(normalized, (copy(view(x)), weight[:6], bias[:6]), grad=copy(view(grad)), **options)
            for copy in (lambda t: t, torch.clone)
        )
        for a, b in zip(mine, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    ours, theirs = (
        with_gradients(f, (x, weight, bias), grad=grad[:1, :1, :1, :1].expand_as(x), **options)
        for f in (normalized, pytorch)
    )
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-5)


def test_nan_stays_in_its_channel(backend):
    x, _, weight, bias = make((2, 3, 4, 4), torch.float32, backend.device)
    x[0, 1, 2, 3] = float("nan")
    y = batch_norm_act(x, weight=weight, bias=bias, training=True, activation="relu6")
    assert y[:, 1].isnan().all() and not y[:, [0, 2]].isnan().any()


def test_a_constant_channel_gives_its_bias(backend):
    x = torch.full((2, 3, 5, 5), 1234.5, device=backend.device)
    bias = torch.tensor([1.0, -2.0, 0.0], device=backend.device)
    y = batch_norm_act(x, bias=bias, training=True)
    assert torch.equal(y, bias.view(1, 3, 1, 1).expand_as(y))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parameters", ["float32", "half"])
def test_half_precision_takes_parameters_of_either_dtype(backend, dtype, parameters):
    x, grad, weight, bias = make((2, 8, 5, 5), dtype, backend.device)
    if parameters == "half":
        weight, bias = weight.to(dtype), bias.to(dtype)
    mean, var = torch.zeros_like(weight), torch.ones_like(weight)
    options = dict(training=True, activation="silu")
    with torch.autocast(backend.device.type, dtype):
        results = with_gradients(
            normalized, (x, weight, bias), grad=grad, running_mean=mean, running_var=var, **options
        )
    assert [r.dtype for r in results] == [dtype, dtype, weight.dtype, weight.dtype]
    expected = exact(x, grad, weight, bias, **options)
    eps = torch.finfo(dtype).eps
    for mine, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(mine.double(), wanted, rtol=eps, atol=eps)
    torch.testing.assert_close(mean.double(), 0.1 * x.double().mean((0, 2, 3)), rtol=eps, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.75, 1.0, torch.tensor(0.25)])
@pytest.mark.parametrize("running_dtype", [torch.float32, torch.bfloat16])
def test_running_statistics_move_by_the_momentum(backend, layout, momentum, running_dtype):
    x, _, weight, bias = make((3, 5, 4, 3), running_dtype, backend.device, layout)
    strided = torch.stack([bias, weight], 1).to(running_dtype)
    for mean, var in ((strided[:, 0].clone(), strided[:, 1].clone()), (strided[:, 0], strided[:, 1])):
        before = mean.double(), var.double()
        batch_norm_act(x, mean, var, training=True, momentum=momentum)
        batch = x.double().mean((0, 2, 3)), x.double().var((0, 2, 3))
        for moved, old, new in zip((mean, var), before, batch, strict=True):
            torch.testing.assert_close(moved, torch.lerp(old, new, float(momentum)).to(running_dtype))


def test_a_backward_through_moved_running_statistics_is_refused(backend):
    if backend.name == "reference":
        pytest.skip("keeps none of them")
    x, _, weight, bias = make((3, 5, 4, 3), torch.float32, backend.device, "nchw")
    mean, var = bias.clone(), weight.clone()
    y = batch_norm_act(x.requires_grad_(), mean, var, training=False)
    batch_norm_act(x.detach(), mean, var, training=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(device, layout):
    x, grad, weight, bias = make((2, 3, 4, 5), torch.float32, device, layout)
    raw, channels_last = torch.ops.effdet_fast, layout == "nhwc"
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
    options = (weight, bias, 1e-3, 1, channels_last)
    torch.library.opcheck(raw.batch_norm_stats.default, (x, channels_last))
    torch.library.opcheck(raw.batch_norm_act.default, (x, mean, var, *options))
    for running in ((None, None), (torch.zeros(3, device=device), torch.ones(3, device=device))):
        torch.library.opcheck(raw.batch_norm_act_train.default, (x, *running, 0.1, *options))
    torch.library.opcheck(raw.batch_norm_act_sums.default, (grad, x, mean, var, *options))
    for sums in (None, torch.randn(2, 3, device=device)):
        torch.library.opcheck(raw.batch_norm_act_grad_input.default, (grad, x, mean, var, sums, *options))
    torch.library.opcheck(raw.batch_norm_act_train_backward.default, (grad, x, mean, var, *options))


X = torch.zeros(2, 3, 4, 5)
ERRORS = [
    (dict(x=[1.0]), TypeError, "x must be a Tensor, got list"),
    (dict(x=X.long()), TypeError, "x must be float16, bfloat16, float32 or float64, got int64"),
    (dict(x=X[0]), ValueError, r"x must have shape \[N, C, H, W\], got \[3, 4, 5\]"),
    (
        dict(x=X[:1, :, :1, :1]),
        ValueError,
        r"expected more than 1 value per channel when training, got input size \[1, 3, 1, 1\]",
    ),
    (dict(activation="gelu"), ValueError, "activation must be one of None, 'silu', 'relu', 'relu6', got 'gelu'"),
    (dict(eps=0), ValueError, "eps must be > 0, or 0 without training, got 0"),
    (dict(eps=-1e-3, training=False), ValueError, "eps must be > 0, or 0 without training, got -0.001"),
    (dict(running_var=None), ValueError, "running_mean and running_var must be given both or neither"),
    (dict(running_mean=None, running_var=None, training=False), ValueError, ".* must be given unless training=True"),
    (dict(weight=torch.ones(4)), ValueError, r"weight must have shape \[3\], got \[4\]"),
    (dict(running_mean=torch.ones(3, 1)), ValueError, r"running_mean must have shape \[3\], got \[3, 1\]"),
    (dict(bias=torch.ones(3).double()), TypeError, "bias must have dtype float32 for this x, got float64"),
    (
        dict(x=X.half(), bias=torch.ones(3).bfloat16()),
        TypeError,
        "bias must have dtype float16 or float32 for this x, got bfloat16",
    ),
    (dict(weight=torch.ones(3, device="meta")), ValueError, "weight must be on the device of x, cpu, got meta"),
]


@pytest.mark.parametrize("change,error,message", ERRORS, ids=[m[:30] for _, _, m in ERRORS])
def test_bad_input(change, error, message):
    arguments = dict(x=X, running_mean=torch.zeros(3), running_var=torch.ones(3), training=True) | change
    with pytest.raises(error, match=f"batch_norm_act: {message}"):
        batch_norm_act(**arguments)
