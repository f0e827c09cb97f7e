"""Do PyTorch's tracing tools take every op: make_fx, FakeTensorMode and, where it can, vmap?"""

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_leaves

from effdet_fast import ops
from effdet_fast.data.batch import normalize
from effdet_fast.models.anchors import AnchorCache
from effdet_fast.models.model_table import CONFIGS
from tests.checks import with_gradients
from tests.ops.every_op import calls_without_gradient, differentiable_calls

CALLS = {**differentiable_calls(), **calls_without_gradient()}


def clones(name):
    call = CALLS[name]
    return call, [t.clone() for t in (*call.differentiable, *call.others)]


def traced(name):
    """The call's function; of one that has gradients, the square of its result and that one's gradients."""
    call = CALLS[name]
    count = len(call.differentiable)

    def function(*tensors):
        if not count:
            return call.function(*tensors)
        return with_gradients(lambda *t: call.function(*t).square(), tensors[:count], *tensors[count:])

    return function


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("name", CALLS)
def test_make_fx(name, mode):
    tensors = clones(name)[1]
    graph = make_fx(traced(name), tracing_mode=mode)(*tensors)
    assert "effdet_fast" in graph.code
    for got, expected in zip(
        tree_leaves(graph(*clones(name)[1])), tree_leaves(traced(name)(*clones(name)[1])), strict=True
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("how", ["fixed", "symbols", "reference"])
@pytest.mark.parametrize("name", CALLS)
def test_fake_tensor_mode(name, how):
    expected = tree_leaves(traced(name)(*clones(name)[1]))
    mode = FakeTensorMode(shape_env=ShapeEnv() if how == "symbols" else None)
    fakes = [mode.from_tensor(t) for t in clones(name)[1]]
    with mode, ops.use_reference() if how == "reference" else nullcontext():
        found = tree_leaves(traced(name)(*fakes))
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


# Of one in each axis and of none at all. For each of these five torch.compile makes a version of its own, of any function.
SHAPES = [(2, 4, 8, 10), (3, 6, 9, 12), (1, 4, 8, 10), (2, 1, 8, 10), (2, 4, 1, 10), (2, 4, 8, 1)]
SHAPES += [(4, 5, 7, 11), (1, 7, 12, 6), (3, 1, 6, 5), (5, 2, 1, 7), (2, 3, 9, 1), (6, 8, 10, 14)]


def layers(x):
    """An op's arguments beside x, by its number of channels."""
    c = x.shape[1]
    generator = torch.Generator().manual_seed(c)
    filters, reduce, expand = (torch.randn(s, generator=generator) for s in ((c, 1, 3, 3), (3, c, 1, 1), (c, 3, 1, 1)))
    return {
        "fusion": (lambda x: ops.weighted_fusion([x, x.exp()], method="sum", activation="silu"), ()),
        "depthwise": (lambda x, w: ops.depthwise_conv2d(x, w, None, 2, "same"), (filters,)),
        "levels": (lambda x, w: ops.depthwise_conv2d_levels([x, x.exp()], w, None, 1, 1)[1], (filters,)),
        "squeeze_excite": (lambda x, a, b: ops.squeeze_excite(x, a, None, b, None), (reduce, expand)),
        "batch_norm": (lambda x: ops.batch_norm_act(x, None, None, None, None, True), ()),
        "focal": (lambda x: ops.sigmoid_focal_loss(x, torch.full_like(x, 0.5)), ()),
        "plain": (lambda x: x.exp(), ()),
    }


@pytest.mark.compiles
@pytest.mark.parametrize("channels_last", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", layers(torch.empty(1, 1)))
def test_sizes_of_one_need_no_more_versions_than_anywhere(name, channels_last):
    function = layers(torch.empty(1, 1))[name][0]
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    with torch._dynamo.config.patch(recompile_limit=5):  # with fullgraph=True, one more is an error
        for shape in SHAPES:
            x = torch.randn(shape).to(memory_format=layout).requires_grad_()
            others = layers(x)[name][1]
            y, expected = compiled(x, *others), function(x, *others)
            torch.testing.assert_close(y, expected)
            torch.testing.assert_close(*(torch.autograd.grad(t.sum(), x)[0] for t in (y, expected)))


def test_caches_keep_no_fake_tensor():
    images, anchors = torch.zeros(1, 3, 4, 4, dtype=torch.uint8), AnchorCache(CONFIGS["efficientdet_d0"])
    halves, mode = [0.375] * 3, FakeTensorMode()
    with mode:
        assert isinstance(normalize(mode.from_tensor(images), halves, halves), FakeTensor)
        assert isinstance(anchors.boxes(torch.device("cpu")), FakeTensor)
    assert type(normalize(images, halves, halves)) is torch.Tensor
    assert type(anchors.boxes(torch.device("cpu"))) is torch.Tensor
