"""`use_reference()`: of the thread that asked for it, also in compiled code."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from effdet_fast import ops
from effdet_fast.ops import _library

X = torch.randn(1, 2, 4, 4)


def kernels_ran(function) -> bool:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return any(event.name.startswith("effdet_fast::") for event in profile.events())


def fused() -> torch.Tensor:
    return ops.weighted_fusion([X, X], method="sum")


def test_it_ends_and_nests():
    assert kernels_ran(fused)
    with ops.use_reference():
        with ops.use_reference():
            assert not kernels_ran(fused)
        assert not kernels_ran(fused)
    assert kernels_ran(fused)


def test_threads_have_their_own():
    """Two that overlap and end in the order in which they began, as two exports may."""
    second_is_in, first_is_out = threading.Event(), threading.Event()

    def first():
        with ops.use_reference():
            assert second_is_in.wait(10)
        first_is_out.set()
        return _library.is_native(X)

    def second():
        with ops.use_reference():
            second_is_in.set()
            assert first_is_out.wait(10)
            inside = _library.is_native(X)
        return inside, _library.is_native(X)

    with ThreadPoolExecutor(2) as pool:
        one, two = pool.submit(first), pool.submit(second)
        assert second_is_in.wait(10)
        assert _library.is_native(X)
        assert (one.result(), two.result()) == (True, (False, True))
    assert kernels_ran(fused)


@pytest.mark.compiles
def test_compiled_code_asks_at_every_call():
    compiled = torch.compile(fused, fullgraph=True, backend="eager")
    for _ in range(2):
        assert kernels_ran(compiled)
        with ops.use_reference():
            assert not kernels_ran(compiled)
            with ThreadPoolExecutor(1) as pool:  # another thread runs its own version
                assert pool.submit(kernels_ran, compiled).result()
            torch.testing.assert_close(compiled(), 2 * X)


def test_a_backward_outside_runs_on_what_its_forward_ran_on():
    x = X.clone().requires_grad_()
    loss = ops.weighted_fusion([x, x], method="sum").sum()
    with ops.use_reference():
        assert kernels_ran(loss.backward)
    with ops.use_reference():
        loss = ops.weighted_fusion([x, x], method="sum").sum()
    assert not kernels_ran(loss.backward)
