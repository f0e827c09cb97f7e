"""A weight per class in the focal losses, on every backend, against a float64 oracle and PyTorch's formula."""

import pytest
import torch
import torch.nn.functional as F

from effdet_fast.nn import FocalLoss
from effdet_fast.ops import detection_loss, sigmoid_focal_loss, sigmoid_focal_loss_reference
from tests.checks import DTYPES, with_gradients
from tests.ops.accuracy import RTOL
from tests.ops.detection_problem import CHANNELS_LAST, CONTIGUOUS, assert_right, problem
from tests.ops.test_focal_loss import make, opcheck_all

# Vectors that straddle rows, rows of one class, more rows than a chunk.
SHAPES = [(5, 1), (2, 3, 7), (1, 129), (400, 30)]


def weights(classes, device, dtype=torch.float32):
    return (torch.rand(classes, dtype=torch.float64) * 3).to(device=device, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["labels", "soft"])
@pytest.mark.parametrize("gamma,label_smoothing", [(2.0, 0.0), (0.7, 0.1)])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_against_float64(backend, dtype, shape, kind, gamma, label_smoothing, reduction):
    inputs, targets = make(shape, dtype, backend.device, kind, spread=3.0)
    class_weight = weights(shape[-1], backend.device, dtype if dtype == torch.float64 else torch.float32)
    grad = torch.randn(shape if reduction == "none" else (), device=backend.device, dtype=torch.float64).to(dtype)
    options = dict(gamma=gamma, reduction=reduction, label_smoothing=label_smoothing)
    loss, grad_x = with_gradients(
        sigmoid_focal_loss, [inputs], targets, grad=grad, class_weight=class_weight, **options
    )
    wide = targets.double() if targets.is_floating_point() else targets
    loss64, grad64 = with_gradients(
        sigmoid_focal_loss_reference,
        [inputs.double()],
        wide,
        grad=grad.double(),
        class_weight=class_weight.double(),
        **options,
    )
    rtol = max(4 * RTOL.get(dtype, RTOL[torch.float32]), 0 if dtype in RTOL else torch.finfo(dtype).eps)
    for mine, exact, scale in ((loss, loss64, loss64.abs().max()), (grad_x, grad64, 3 * grad.double().abs().max())):
        tiny = torch.finfo(mine.dtype).tiny
        assert ((mine.double() - exact).abs() <= rtol * torch.maximum(exact.abs(), scale) + tiny).all()


@pytest.mark.parametrize("kind", ["labels", "soft"])
def test_is_the_weight_of_pytorchs_cross_entropy(backend, kind):
    inputs, targets = make((6, 5), torch.float64, backend.device, kind)
    class_weight = weights(5, backend.device, torch.float64)
    one_hot = targets
    if kind == "labels":
        targets = targets.clamp(min=-1)
        one_hot = F.one_hot(targets + 1, 6)[:, 1:].double()
    ours = with_gradients(sigmoid_focal_loss, [inputs], targets, -1, 0, "sum", class_weight=class_weight)
    theirs = with_gradients(F.binary_cross_entropy_with_logits, [inputs], one_hot, class_weight, reduction="sum")
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_channels_last_targets_are_weighed_by_their_last_dimension(backend):
    inputs, targets = (
        x.to(memory_format=torch.channels_last) for x in make((2, 3, 4, 5), torch.float32, "cpu", "soft")
    )
    inputs, targets, class_weight = inputs.to(backend.device), targets.to(backend.device), weights(5, backend.device)
    ours = sigmoid_focal_loss(inputs, targets, class_weight=class_weight)
    torch.testing.assert_close(ours, sigmoid_focal_loss(inputs, targets) * class_weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST], ids=str)
@pytest.mark.parametrize("sizes,per_cell,classes", [([(16, 4), (3, 5)], 2, 8), ([(5, 7)], 3, 37)], ids=str)
@pytest.mark.parametrize("gamma", [1.5, 2.0])
def test_detection_loss_against_float64(backend, dtype, layout, sizes, per_cell, classes, gamma):
    given = problem(sizes, per_cell, classes, dtype, backend.device, layout)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    assert_right(
        detection_loss,
        given,
        num_classes=classes,
        gamma=gamma,
        class_weight=weights(classes, backend.device, acc),
    )


@pytest.mark.parametrize("kind", ["labels", "soft"])
def test_gradcheck(backend, kind):
    inputs, targets = make((3, 4), torch.float64, backend.device, kind, spread=2.0)
    class_weight = weights(4, backend.device, torch.float64)
    inputs.requires_grad_()
    torch.autograd.gradcheck(lambda x: sigmoid_focal_loss(x, targets, class_weight=class_weight), inputs)
    torch.autograd.gradgradcheck(lambda x: sigmoid_focal_loss(x, targets, class_weight=class_weight), inputs)


def test_raw_ops_with_weights(device):
    inputs, targets = make((2, 3, 4), torch.float32, device, "labels")
    opcheck_all(inputs, targets, 0.25, 2.0, 0.1, weights(4, device))


@pytest.mark.compiles
def test_compiles_without_a_break(device):
    inputs, targets = make((6, 11), torch.float32, device, "labels")
    class_weight = weights(11, device)

    def loss(x, t):
        return sigmoid_focal_loss(x, t, reduction="sum", class_weight=class_weight)

    ours = with_gradients(torch.compile(loss, fullgraph=True), [inputs], targets)
    torch.testing.assert_close(ours, with_gradients(loss, [inputs], targets), rtol=0, atol=0)


def test_the_module_keeps_it_as_a_buffer():
    inputs, targets = make((3, 4), torch.float32, "cpu", "labels")
    class_weight = weights(4, "cpu")
    module = FocalLoss(class_weight=class_weight)
    assert torch.equal(module(inputs, targets), sigmoid_focal_loss(inputs, targets, class_weight=class_weight))
    assert list(module.state_dict()) == ["class_weight"] and not FocalLoss().state_dict()
    assert module.double().class_weight.dtype == torch.float64


@pytest.mark.parametrize(
    "class_weight,error,message",
    [
        ([1.0, 2.0, 3.0, 4.0], TypeError, "class_weight must be a Tensor, got list"),
        (torch.ones(4, dtype=torch.int64), TypeError, "class_weight must be float16, .* got int64"),
        (torch.ones(3), ValueError, r"class_weight must be of shape \[4\], got \[3\]"),
        (torch.ones(1, 4), ValueError, r"class_weight must be of shape \[4\], got \[1, 4\]"),
        (torch.ones(4, device="meta"), ValueError, "class_weight must be on the device of .*, cpu, got meta"),
        (torch.ones(4, requires_grad=True), ValueError, "class_weight must not require a gradient"),
    ],
)
def test_bad_weights(class_weight, error, message):
    inputs, targets = make((3, 4), torch.float32, "cpu", "labels")
    with pytest.raises(error, match=f"sigmoid_focal_loss: {message}"):
        sigmoid_focal_loss(inputs, targets, class_weight=class_weight)
    outputs, *given, anchors = problem([(2, 2)], 1, 4, torch.float32, "cpu")
    with pytest.raises(error, match=f"detection_loss: {message}"):
        detection_loss(outputs[:1], outputs[1:], *given, num_classes=4, class_weight=class_weight)
