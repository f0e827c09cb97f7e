"""Do PyTorch's tracing tools take every op: make_fx, FakeTensorMode and, where it can, vmap?"""

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_leaves

from effdet_fast import ops
from tests.ops.every_op import calls_without_gradient, differentiable_calls

CALLS = {**differentiable_calls(), **calls_without_gradient()}


def clones(name):
    call = CALLS[name]
    return call, [t.clone() for t in (*call.differentiable, *call.others)]


def with_gradients(name):
    """The call's function and, where it has any, the gradients of its result."""
    call = CALLS[name]
    count = len(call.differentiable)

    def function(*tensors):
        if not count:
            return call.function(*tensors)
        leaves = [t.detach().requires_grad_() for t in tensors[:count]]
        y = call.function(*leaves, *tensors[count:])
        return y, *torch.autograd.grad(y.square().sum(), leaves)

    return function


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("name", CALLS)
def test_make_fx(name, mode):
    tensors = clones(name)[1]
    graph = make_fx(with_gradients(name), tracing_mode=mode)(*tensors)
    assert "effdet_fast" in graph.code
    for got, expected in zip(
        tree_leaves(graph(*clones(name)[1])), tree_leaves(with_gradients(name)(*clones(name)[1])), strict=True
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("how", ["fixed", "symbols", "reference"])
@pytest.mark.parametrize("name", CALLS)
def test_fake_tensor_mode(name, how):
    expected = tree_leaves(with_gradients(name)(*clones(name)[1]))
    mode = FakeTensorMode(shape_env=ShapeEnv() if how == "symbols" else None)
    fakes = [mode.from_tensor(t) for t in clones(name)[1]]
    with mode, ops.use_reference() if how == "reference" else nullcontext():
        found = tree_leaves(with_gradients(name)(*fakes))
    for fake, real in zip(found, expected, strict=True):
        assert fake.dtype == real.dtype and fake.fake_mode is mode
        assert [int(size) for size in fake.shape] == list(real.shape)


@pytest.mark.parametrize("name", ["focal_labels", "detection_loss_huber", "match_anchors"])
def test_values_of_fake_tensors_are_not_looked_at_outside_of_their_mode_either(name):
    mode = FakeTensorMode()
    call, tensors = clones(name)
    for y in tree_leaves(call.function(*[mode.from_tensor(t) for t in tensors])):
        assert y.fake_mode is mode


@pytest.mark.parametrize("reference", [False, True])
def test_values_of_a_batch_of_vmap_are_not_looked_at(reference):
    logits, labels = torch.randn(3, 4, 5), torch.randint(-2, 5, (3, 4))
    anchors, boxes, _, counts = CALLS["match_anchors"].others
    with ops.use_reference() if reference else nullcontext():
        together = torch.vmap(ops.sigmoid_focal_loss)(logits, labels)
        torch.testing.assert_close(together, ops.sigmoid_focal_loss(logits, labels))
        match = lambda b, t, n: ops.match_anchors(anchors, b[None], t[None], n[None]).labels[0]  # noqa: E731
        matched = torch.vmap(match)(boxes, torch.zeros(2, 3, dtype=torch.int64), counts)
        assert matched.shape == (2, len(anchors))
