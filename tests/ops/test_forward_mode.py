"""Forward-mode derivatives of every op, as a user calls it: jvp, jacfwd, dual tensors, and over the gradients of backward."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from effdet_fast import ops
from tests.checks import with_gradients
from tests.ops.every_op import calls_of_unknown_size, calls_without_gradient, differentiable_calls

CALLS = differentiable_calls()
WITHOUT_GRADIENT = {**calls_without_gradient(), **calls_of_unknown_size()}
STEP = 1e-6


@pytest.fixture(params=CALLS)
def problem(request):
    """An op, its inputs and a direction."""
    call = CALLS[request.param]
    generator = torch.Generator().manual_seed(3)
    return call, call.differentiable, [torch.randn(x.shape, generator=generator).double() for x in call.differentiable]


def along(function, inputs, direction):
    """Central differences."""
    ahead, behind = (function(*[x + s * v for x, v in zip(inputs, direction, strict=True)]) for s in (STEP, -STEP))
    return [(a - b) / (2 * STEP) for a, b in zip(tree_leaves(ahead), tree_leaves(behind), strict=True)]


def check(found, expected):
    for tangent, difference in zip(tree_leaves(found), expected, strict=True):
        torch.testing.assert_close(tangent, difference, rtol=1e-5, atol=1e-6)


def test_jvp(problem):
    call, inputs, direction = problem
    check(torch.func.jvp(call, tuple(inputs), tuple(direction))[1], along(call, inputs, direction))


def test_jacfwd(problem):
    call, inputs, direction = problem
    jacobians = torch.func.jacfwd(call, argnums=tuple(range(len(inputs))))(*inputs)
    expected = along(call, inputs, direction)
    parts = [j.flatten(expected[0].dim()) @ v.flatten() for j, v in zip(jacobians, direction, strict=True)]
    check([torch.stack(parts).sum(0)], expected)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_dual_tensors(problem, requires_grad):
    call, inputs, direction = problem
    inputs = [x.clone().requires_grad_(requires_grad) for x in inputs]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, v) for x, v in zip(inputs, direction, strict=True)]
        tangent = forward_ad.unpack_dual(call(*duals)).tangent
    check(tangent, along(call, inputs, direction))


def gradients_of(call):
    def gradients(*inputs):
        return with_gradients(lambda *x: call(*x).square(), inputs)[1:]

    return gradients


def test_jvp_of_gradients(problem):
    call, inputs, direction = problem
    every = tuple(range(len(inputs)))
    gradients = torch.func.grad(lambda *x: call(*x).square().sum(), argnums=every)
    tangents = torch.func.jvp(gradients, tuple(inputs), tuple(direction))[1]
    check(tangents, along(gradients_of(call), inputs, direction))


def test_backward_of_a_dual_upstream_gradient(problem):
    """The forward pass was outside of the level: it ran the kernels."""
    call, inputs, _ = problem
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = call(*leaves)
    upstream, tangent = torch.randn_like(y), torch.randn_like(y)
    expected = torch.autograd.grad(y, leaves, tangent, retain_graph=True)
    with forward_ad.dual_level():
        found = torch.autograd.grad(y, leaves, forward_ad.make_dual(upstream, tangent))
        tangents = [forward_ad.unpack_dual(grad).tangent for grad in found]
    assert not any(grad.requires_grad for grad in found)
    check(tangents, expected)


@pytest.mark.parametrize("name", WITHOUT_GRADIENT)
def test_ops_without_gradient_work_inside_a_level(name):
    call = WITHOUT_GRADIENT[name]
    expected = call.function(*call.others)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, torch.ones_like(t)) if t.is_floating_point() else t for t in call.others]
        found = call.function(*duals)
        tangents = [forward_ad.unpack_dual(t).tangent for t in tree_leaves(found) if t.is_floating_point()]
    assert tangents == [None] * len(tangents)
    torch.testing.assert_close(tuple(found), tuple(expected), check_device=False)


@pytest.mark.parametrize("how", ["jvp", "jacfwd", "dual"])
def test_running_statistics_move_and_get_no_tangent(how):
    """In training mode, as F.batch_norm's."""
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)

    def run(batch_norm):
        running = (torch.zeros(3).double(), torch.ones(3).double())
        function = lambda z: batch_norm(z, *running, None, None, True)  # noqa: E731
        if how == "jvp":
            result = torch.func.jvp(function, (x,), (x.square(),))[1]
        elif how == "jacfwd":
            result = torch.func.jacfwd(function)(x)
        else:
            with forward_ad.dual_level():
                result = forward_ad.unpack_dual(function(forward_ad.make_dual(x, x.square()))).tangent
                assert [forward_ad.unpack_dual(t).tangent for t in running] == [None, None]
        return result, *running

    torch.testing.assert_close(run(ops.batch_norm_act), run(F.batch_norm))


@pytest.mark.parametrize("name", ["fusion", "levels"])
def test_a_tensor_given_twice_has_a_second_derivative_for_each_place(name):
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    filters = torch.randn(3, 1, 3, 3, dtype=torch.float64)

    def twice(x):
        if name == "fusion":
            return ops.weighted_fusion([x, x], method="sum", activation="silu")
        first, second = ops.depthwise_conv2d_levels([x, x], filters, None, 1, 1, prologue="silu")
        return first * second

    assert torch.autograd.gradgradcheck(twice, (x,))
