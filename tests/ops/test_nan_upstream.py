"""A gradient of NaN from above: what takes no part in the result gets 0, as in PyTorch; everything else gets NaN."""

import pytest
import torch

from effdet_fast import ops

NAN = float("nan")


def gradient(function, x, backend, upstream=None):
    x = x.to(backend.device).requires_grad_()
    y = function(x)
    upstream = torch.full_like(y, NAN) if upstream is None else upstream
    return torch.autograd.grad(y, x, upstream)[0].cpu()


def check(function, x, takes_part, backend):
    found = gradient(function, x, backend)
    assert torch.equal(found.isnan(), takes_part)
    assert not found[~takes_part].any()


def test_ignored_labels(backend):
    labels = torch.tensor([0, -1, -2, 2])
    takes_part = (labels != -2).unsqueeze(1).expand(4, 3)
    for reduction in ("none", "sum", "mean"):
        loss = lambda x: ops.sigmoid_focal_loss(x, labels.to(x.device), reduction=reduction)  # noqa: B023, E731
        check(loss, torch.randn(4, 3), takes_part, backend)


def test_taps_that_are_not_the_maximum(backend):
    x = torch.arange(16.0).view(1, 1, 4, 4)
    pooled = lambda x: ops.weighted_fusion([x, x.detach()], method="sum", resample=["max_pool"] * 2)  # noqa: E731
    takes_part = torch.zeros_like(x, dtype=torch.bool)
    takes_part[..., 2:, 2:] = True
    check(pooled, x, takes_part, backend)


def test_one_element_alone(backend):
    """Of a NaN at one place the elements that do not lead there know nothing."""
    x = torch.randn(2, 3, 4, 4)
    upstream = torch.zeros(2, 3, 4, 4, device=backend.device)
    upstream[1, 2, 3, 3] = NAN
    mean, var = torch.zeros(3, device=backend.device), torch.ones(3, device=backend.device)
    functions = [
        lambda x: ops.sigmoid_focal_loss(x, torch.full_like(x, 0.5)),
        lambda x: ops.weighted_fusion([x, x.detach()], method="sum", activation="silu"),
        lambda x: ops.batch_norm_act(x, mean, var, activation="silu"),
        lambda x: ops.depthwise_conv2d(x, x.new_ones(3, 1, 3, 3), None, 1, 1, prologue="silu"),
    ]
    for i, function in enumerate(functions):
        found = gradient(function, x, backend, upstream).isnan()
        expected = torch.zeros_like(x, dtype=torch.bool)
        expected[1, 2, 2 if i == 3 else 3 :, 2 if i == 3 else 3 :] = True
        assert torch.equal(found, expected)


RELUS = {
    "depthwise": lambda x, name: ops.depthwise_conv2d(x, x.new_ones(3, 1, 3, 3), None, 1, 1, prologue=name),
    "levels": lambda x, name: ops.depthwise_conv2d_levels([x], x.new_ones(3, 1, 3, 3), None, 1, 1, prologue=name)[0],
    "fusion": lambda x, name: ops.weighted_fusion([x, x.detach()], method="sum", activation=name),
    "batch_norm": lambda x, name: ops.batch_norm_act(x, x.new_zeros(3), x.new_ones(3), activation=name),
}


@pytest.mark.parametrize("name", ["relu", "relu6"])
@pytest.mark.parametrize("op", RELUS)
def test_what_an_activation_cuts_off(op, name, backend):
    x = 8 * torch.randn(2, 3, 4, 4)
    highest = 6 if name == "relu6" else torch.inf
    whole = 2 * x if op == "fusion" else x
    check(lambda x: RELUS[op](x, name), x, (whole > 0) & (whole < highest), backend)


@pytest.mark.parametrize("name", ["relu", "relu6"])
def test_what_the_activation_of_a_gate_cuts_off(name, backend):
    x, expand = torch.ones(1, 3, 2, 2, device=backend.device), torch.randn(3, 4, 1, 1, device=backend.device)
    reduce = torch.tensor([-2.0, 1, 9, -1]).view(4, 1, 1, 1).expand(4, 3, 1, 1).clone()
    takes_part = ((reduce > 0) & (3 * reduce < (6 if name == "relu6" else torch.inf))).expand(4, 3, 1, 1)
    check(lambda w: ops.squeeze_excite(x, w, None, expand, None, activation=name), reduce, takes_part, backend)


@pytest.mark.parametrize("box_loss", ["huber", "l1"])
def test_what_the_detection_loss_masks(box_loss, backend):
    labels, deltas = torch.tensor([[-2, -1, 0, 1]]), torch.ones(1, 4, 4)
    deltas[0, 2, 1] = 0
    targets = [t.to(backend.device) for t in (labels, deltas, torch.ones(1))]
    options = {"num_classes": 2, "box_loss": box_loss}
    logits, outputs = torch.randn(1, 2, 2, 2), torch.randn(1, 4, 2, 2)
    ignored = (labels != -2).view(1, 1, 2, 2).expand(1, 2, 2, 2)
    loss = lambda x: ops.detection_loss([x], [outputs.to(x.device)], *targets, **options).total  # noqa: E731
    check(loss, logits, ignored, backend)
    takes_part = deltas != 0 if box_loss == "huber" else (labels >= 0).unsqueeze(2).expand(1, 4, 4)
    loss = lambda x: ops.detection_loss([logits.to(x.device)], [x], *targets, **options).total  # noqa: E731
    check(loss, outputs, takes_part.mT.reshape(1, 4, 2, 2), backend)
