"""Focal loss on every backend, against a float64 oracle and against torchvision and effdet."""

import pytest
import torch
from torchvision.ops import sigmoid_focal_loss as torchvision_focal_loss

from effdet_fast import ops
from effdet_fast.nn import FocalLoss
from effdet_fast.ops import sigmoid_focal_loss, sigmoid_focal_loss_reference
from tests.checks import DTYPES, assert_same_in_every_run, with_gradients
from tests.ops.accuracy import assert_accurate, guarded

SHAPES = [(0, 3), (1, 1), (5, 1), (3, 7), (1, 129), (4, 3, 13), (2, 37, 90)]
OPTIONS = [(0.25, 2.0, 0.0), (0.25, 1.5, 0.1), (-1.0, 0.7, 0.0), (0.6, 0.0, 0.3)]


def make(shape, dtype, device, kind, spread=6.0):
    inputs = (torch.randn(shape, dtype=torch.float64) * spread).to(dtype)
    if kind == "labels":
        targets = torch.randint(-2, shape[-1], shape[:-1])
    elif kind == "soft":
        targets = torch.rand(shape, dtype=torch.float64).to(dtype)
    else:
        targets = torch.randint(0, 2, shape).to(dtype)
    return inputs.to(device), targets.to(device)


def exact(inputs, targets, *args, grad=None, **options):
    targets = targets.double() if targets.is_floating_point() else targets
    return with_gradients(sigmoid_focal_loss_reference, [inputs.double()], targets, *args, grad=grad, **options)


def eager(inputs, targets, alpha, gamma, reduction, label_smoothing=0.0):
    """The formula in PyTorch, in the dtype of the inputs."""
    t = torch.nn.functional.one_hot(targets.clamp(min=-1) + 1, inputs.shape[-1] + 1)[..., 1:].to(inputs.dtype)
    keep = (targets != -2).unsqueeze(-1)
    p = torch.sigmoid(inputs)
    smoothed = t * (1 - label_smoothing) + label_smoothing / 2
    ce = torch.nn.functional.binary_cross_entropy_with_logits(inputs, smoothed, reduction="none")
    loss = ce * ((1 - (p * t + (1 - p) * (1 - t))) ** gamma)
    loss = loss * (alpha * t + (1 - alpha) * (1 - t)) if alpha >= 0 else loss
    loss = loss * keep
    return loss if reduction == "none" else loss.sum()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("alpha,gamma,label_smoothing", OPTIONS)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_labels_against_float64(backend, dtype, shape, alpha, gamma, label_smoothing, reduction):
    inputs, targets = make(shape, dtype, backend.device, "labels", spread=3.0 if gamma == 0.7 else 6.0)
    inputs, targets = guarded(inputs), guarded(targets)
    grad = torch.randn(shape if reduction == "none" else (), device=backend.device, dtype=torch.float64).to(dtype)
    options = dict(label_smoothing=label_smoothing)
    loss, grad_x = with_gradients(sigmoid_focal_loss, [inputs], targets, alpha, gamma, reduction, grad=grad, **options)
    loss64, grad64 = exact(inputs, targets, alpha, gamma, reduction, grad=grad.double(), **options)
    peer_loss, peer_grad = with_gradients(eager, [inputs], targets, alpha, gamma, reduction, grad=grad, **options)
    assert loss.dtype == (dtype if reduction == "none" or dtype == torch.float64 else torch.float32)
    if reduction == "sum":
        # Terms have both signs with smoothing: the scale is the sum of magnitudes.
        scale = exact(inputs, targets, alpha, gamma, "none", **options)[0].abs().sum()
        assert_accurate(loss, loss64, peer_loss, scale=scale)
    else:
        assert_accurate(loss, loss64, peer_loss, scale=1e-2)
    # The gradient is a difference of terms of the size of the upstream value times the loss's slope.
    assert_accurate(grad_x, grad64, peer_grad, scale=grad.abs().double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("label", ["first", "last", -2])
@pytest.mark.parametrize("classes", [7, 8, 13, 90])
def test_one_row_that_is_not_background(backend, dtype, label, classes):
    """Vectors of background only take a way of their own; here each row in turn is the one they must not miss."""
    inputs, _ = make((12, classes), dtype, backend.device, "labels")
    for row in range(12):
        targets = torch.full((12,), -1, device=backend.device)
        targets[row] = {"first": 0, "last": classes - 1}.get(label, label)
        for reduction in ("none", "sum"):
            loss, grad_x = with_gradients(sigmoid_focal_loss, [inputs], targets, 0.25, 1.5, reduction)
            loss64, grad64 = exact(inputs, targets, 0.25, 1.5, reduction)
            peer_loss, peer_grad = with_gradients(eager, [inputs], targets, 0.25, 1.5, reduction)
            assert_accurate(loss, loss64, peer_loss, scale=1e-2)
            assert_accurate(grad_x, grad64, peer_grad, scale=1)


def test_more_logits_than_threads(native_backend):
    """So many that each thread of the largest grid takes a second vector, at a place it steps to."""
    inputs, targets = make((24300, 90), torch.float32, native_backend.device, "labels")
    targets[::2] = -1
    loss, grad_x = with_gradients(sigmoid_focal_loss, [inputs], targets, 0.25, 2.0, "sum")
    loss64, grad64 = exact(inputs, targets, 0.25, 2.0, "sum")
    assert_accurate(loss, loss64)
    assert_accurate(grad_x, grad64, scale=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize("gamma", [0.0, 0.7, 1.5, 2.0])
@pytest.mark.parametrize("channels_last", [False, True])
def test_floating_targets_against_float64(backend, dtype, kind, gamma, channels_last):
    inputs, targets = make((2, 3, 5, 7), dtype, backend.device, kind)
    if channels_last:
        inputs = inputs.to(memory_format=torch.channels_last)
    for reduction in ("none", "sum", "mean"):
        loss, grad_x = with_gradients(sigmoid_focal_loss, [inputs], targets, 0.25, gamma, reduction)
        loss64, grad64 = exact(inputs, targets, 0.25, gamma, reduction)
        assert_accurate(loss, loss64, scale=1e-2)
        assert_accurate(grad_x, grad64, scale=1e-2)
        if backend.name != "reference":
            assert grad_x.stride() == inputs.stride()
            assert reduction != "none" or loss.stride() == inputs.stride()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("alpha", [0.25, -1])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_equals_torchvision(backend, dtype, alpha, reduction):
    inputs, targets = make((6, 31), dtype, backend.device, "hard", spread=4.0)
    ours = with_gradients(sigmoid_focal_loss, [inputs], targets, alpha, 2.0, reduction)
    theirs = with_gradients(torchvision_focal_loss, [inputs], targets, alpha, 2.0, reduction)
    rtol = 1e-5 if dtype == torch.float32 else 1e-12
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=rtol, atol=rtol * 0.1)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_equals_effdet(backend, label_smoothing):
    new_focal_loss = pytest.importorskip("effdet.loss").new_focal_loss
    inputs, targets = make((5, 9, 20), torch.float32, backend.device, "labels")
    targets = targets.clamp(min=-1)
    one_hot = torch.nn.functional.one_hot(targets + 1, 21)[..., 1:].float()
    normalizer = torch.tensor(7.0, device=backend.device)

    def theirs(x):
        return new_focal_loss(x, one_hot, 0.25, 1.5, normalizer, label_smoothing=label_smoothing).sum()

    options = dict(label_smoothing=label_smoothing, normalizer=normalizer)
    mine = with_gradients(sigmoid_focal_loss, [inputs], targets, 0.25, 1.5, "sum", **options)
    other = with_gradients(theirs, [inputs])
    torch.testing.assert_close(mine[0], other[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(mine[1], other[1], rtol=1e-4, atol=1e-7)


def test_extreme_logits(backend):
    """Where peers give NaN or infinity: gamma below 1 at a saturated positive, and logits far out."""
    inputs = torch.tensor([[20.0], [-100.0], [100.0], [-20.0], [0.0], [3e4], [-3e4]], device=backend.device)
    for label in (0, -1):
        targets = torch.full((7,), label, device=backend.device)
        for gamma in (0.0, 0.5, 1.5, 2.0):
            loss, grad_x = with_gradients(sigmoid_focal_loss, [inputs], targets, 0.25, gamma)
            loss64, grad64 = exact(inputs, targets, 0.25, gamma)
            assert torch.isfinite(loss).all() and torch.isfinite(grad_x).all()
            torch.testing.assert_close(loss.double(), loss64, rtol=2e-5, atol=1e-12)
            torch.testing.assert_close(grad_x.double(), grad64, rtol=2e-5, atol=1e-12)


def test_nan_logit_stays_nan(backend):
    inputs = torch.tensor([[float("nan"), 1.0], [2.0, 3.0]], device=backend.device)
    loss, grad_x = with_gradients(sigmoid_focal_loss, [inputs], torch.tensor([1, -1], device=backend.device))
    expected = torch.tensor([[True, False], [False, False]], device=backend.device)
    assert torch.equal(loss.isnan(), expected) and torch.equal(grad_x.isnan(), expected)


@pytest.mark.parametrize("kind", ["labels", "soft"])
@pytest.mark.parametrize("gamma", [0.0, 0.7, 1.5, 2.0])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_gradcheck(backend, kind, gamma, reduction):
    inputs, targets = make((4, 5), torch.float64, backend.device, kind, spread=2.0)
    inputs.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: sigmoid_focal_loss(x, targets, 0.25, gamma, reduction, label_smoothing=0.1), inputs
    )


def test_normalizer_divides_on_the_device(backend):
    inputs, targets = make((6, 4), torch.float64, backend.device, "labels")
    total = sigmoid_focal_loss(inputs, targets, reduction="sum")
    for normalizer in (4.0, torch.tensor(4.0, dtype=torch.float64, device=backend.device)):
        assert torch.equal(sigmoid_focal_loss(inputs, targets, reduction="sum", normalizer=normalizer), total / 4)


def test_ignored_rows_have_no_loss_and_no_gradient(native_backend):
    inputs, _ = make((3, 5), torch.float32, native_backend.device, "labels")
    loss, grad_x = with_gradients(sigmoid_focal_loss, [inputs], torch.tensor([-2, 1, -2], device=inputs.device))
    assert not loss[[0, 2]].any() and not grad_x[[0, 2]].any() and loss[1].all()


def test_second_backward_and_scaled_upstream(native_backend):
    inputs, targets = make((8, 16), torch.float32, native_backend.device, "labels")
    inputs.requires_grad_()
    loss = sigmoid_focal_loss(inputs, targets, reduction="sum")
    (first,) = torch.autograd.grad(loss, inputs, retain_graph=True)
    (second,) = torch.autograd.grad(loss, inputs, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss, inputs, torch.tensor(1024.0, device=inputs.device))
    assert torch.equal(first, second) and torch.equal(scaled, first * 1024)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_second_derivative(native_backend, reduction):
    inputs, targets = make((2, 3), torch.float64, native_backend.device, "labels", spread=2.0)
    inputs.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: sigmoid_focal_loss(x, targets, 0.25, 1.5, reduction), inputs)


def test_same_bits_every_time(native_backend):
    inputs, targets = make(
        (700 if native_backend.name == "emulated" else 40000, 90), torch.float32, native_backend.device, "labels"
    )
    repeats = 3 if native_backend.name == "emulated" else 20
    found = assert_same_in_every_run(lambda: sigmoid_focal_loss(inputs, targets, reduction="sum"), repeats)
    expected = sigmoid_focal_loss_reference(inputs.double(), targets, reduction="sum")
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def opcheck_all(inputs, targets, *options):
    raw = torch.ops.effdet_fast
    torch.library.opcheck(raw.focal_loss.default, (inputs, targets, *options))
    torch.library.opcheck(raw.focal_loss_sum.default, (inputs, targets, *options))
    torch.library.opcheck(raw.focal_loss_backward.default, (inputs, inputs, targets, *options))


@pytest.mark.parametrize("kind", ["labels", "soft"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(device, kind, channels_last):
    inputs, targets = make((2, 3, 4, 5), torch.float32, device, kind)
    if channels_last and kind == "soft":
        inputs, targets = (x.to(memory_format=torch.channels_last) for x in (inputs, targets))
    options = (0.25, 2.0, 0.1, None)
    opcheck_all(inputs, targets, *options)
    scalar = torch.tensor(2.0, device=device)
    torch.library.opcheck(torch.ops.effdet_fast.focal_loss_backward.default, (scalar, inputs, targets, *options))


@pytest.mark.compiles
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compiles_without_a_break(device, reduction):
    inputs, targets = make((6, 11), torch.float32, device, "labels")
    compiled = torch.compile(lambda x, t: sigmoid_focal_loss(x, t, reduction=reduction), fullgraph=True)
    ours = with_gradients(compiled, [inputs], targets)
    # On a GPU the mean is a product with a reciprocal, which the compiler rounds for itself.
    rtol = 1e-6 if reduction == "mean" and device.type == "cuda" else 0
    for mine, other in zip(
        ours, with_gradients(sigmoid_focal_loss, [inputs], targets, reduction=reduction), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend, dtype):
    inputs, targets = make((4, 6), dtype, backend.device, "labels")
    soft = torch.rand(4, 6, device=backend.device)
    with torch.autocast(backend.device.type, dtype):
        for reduction in ("none", "sum"):
            loss, grad_x = with_gradients(sigmoid_focal_loss, [inputs], targets, reduction=reduction)
            assert loss.dtype == torch.float32 and grad_x.dtype == dtype
            torch.testing.assert_close(
                loss.double(), exact(inputs, targets, reduction=reduction)[0], rtol=1e-5, atol=1e-7
            )
        assert sigmoid_focal_loss(inputs, soft).dtype == torch.float32


def test_strided_inputs_give_the_same(backend):
    """A head output permuted to [B, H, W, A, C] is read in place when it is channels_last, and through a copy when not."""
    head = torch.randn(2, 9 * 4, 3, 5, device=backend.device)
    targets = torch.randint(-1, 4, (2, 3, 5, 9), device=backend.device)
    results = []
    for x in (head, head.to(memory_format=torch.channels_last)):
        view = x.permute(0, 2, 3, 1).unflatten(-1, (9, 4))
        results.append(with_gradients(sigmoid_focal_loss, [view], targets))
    # PyTorch's softplus, which the reference uses, rounds otherwise where vectors end, and so by the strides.
    exact = {"rtol": 1e-6, "atol": 1e-7} if backend.name == "reference" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(results[0], results[1], **exact)
    expanded = torch.randn(1, 4, device=backend.device).expand(6, 4)
    torch.testing.assert_close(
        sigmoid_focal_loss(expanded, targets.flatten()[:6]), sigmoid_focal_loss(expanded.clone(), targets.flatten()[:6])
    )


def test_module_is_the_function():
    inputs, targets = make((3, 4), torch.float32, "cpu", "labels")
    module = FocalLoss(0.3, 1.5, "sum", 0.1)
    expected = sigmoid_focal_loss(inputs, targets, 0.3, 1.5, "sum", label_smoothing=0.1, normalizer=3.0)
    assert torch.equal(module(inputs, targets, 3.0), expected)
    assert not list(module.state_dict()) and "gamma=1.5" in repr(module)


X = torch.zeros(2, 3)
ERRORS = [
    (dict(inputs=[1.0]), TypeError, "inputs must be a Tensor, got list"),
    (dict(inputs=X.long()), TypeError, "inputs must be float16, bfloat16, float32 or float64, got int64"),
    (dict(targets=X.bool()), TypeError, "targets must be floating or integer, got bool"),
    (dict(targets=X.double()), TypeError, "floating targets must have the dtype of inputs, float32, got float64"),
    (
        dict(targets=torch.zeros(3).long()),
        ValueError,
        r"targets must have shape \[2\] \(labels\) or \[2, 3\], got \[3\]",
    ),
    (dict(targets=torch.zeros(3, 2)), ValueError, r"targets must have shape .*, got \[3, 2\]"),
    (dict(targets=torch.tensor([0, 3])), ValueError, r"labels must be a class in \[0, 3\), .* got 3"),
    (dict(targets=torch.tensor([-3, 0])), ValueError, "labels must be .* got -3"),
    (dict(targets=X.clone().requires_grad_()), ValueError, "targets must not require a gradient"),
    (
        dict(targets=torch.zeros(2, 3, device="meta")),
        ValueError,
        "targets must be on the device of inputs, cpu, got meta",
    ),
    (dict(alpha=1.5), ValueError, r"alpha must be in \[0, 1\], or -1 for no weighting, got 1.5"),
    (dict(alpha=float("nan")), ValueError, "alpha must be .* got nan"),
    (dict(gamma=-1), ValueError, "gamma must be >= 0, got -1"),
    (dict(label_smoothing=2), ValueError, r"label_smoothing must be in \[0, 1\], got 2"),
    (dict(reduction="avg"), ValueError, "reduction must be one of 'none', 'mean', 'sum', got 'avg'"),
    (dict(normalizer=2.0), ValueError, "normalizer needs reduction='sum', got reduction='none'"),
    (
        dict(normalizer=X, reduction="sum"),
        ValueError,
        r"normalizer must be a number or a 0-d tensor, got shape \[2, 3\]",
    ),
]


@pytest.mark.parametrize("change,error,message", ERRORS, ids=[m[:30] for _, _, m in ERRORS])
def test_bad_input(change, error, message):
    arguments = dict(inputs=X, targets=torch.zeros(2, dtype=torch.int64)) | change
    with pytest.raises(error, match=f"sigmoid_focal_loss: {message}"):
        sigmoid_focal_loss(**arguments)


def test_small_label_types():
    inputs, targets = make((6, 5), torch.float32, "cpu", "labels")
    for dtype in (torch.int32, torch.int16, torch.int8):
        assert torch.equal(sigmoid_focal_loss(inputs, targets.to(dtype)), sigmoid_focal_loss(inputs, targets))


@pytest.mark.cuda
def test_bad_labels_on_a_gpu_are_named_in_debug_mode():
    inputs = torch.zeros(2, 3, device="cuda")
    targets = torch.tensor([0, 3], device="cuda")
    sigmoid_focal_loss(inputs, targets)  # counts as background
    ops.set_debug(True)
    try:
        with pytest.raises(ValueError, match="labels must be"):
            sigmoid_focal_loss(inputs, targets)
    finally:
        ops.set_debug(False)
