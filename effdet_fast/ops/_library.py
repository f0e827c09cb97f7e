"""The raw operators `torch.ops.effdet_fast.*`: schemas and fake functions live in Python, kernels in the compiled libraries."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad

from effdet_fast._libraries import native_device_types
from effdet_fast.ops._arguments import device_type

_LIBRARY = torch.library.Library("effdet_fast", "FRAGMENT")
SCHEMAS: dict[str, str] = {}
_NATIVE = native_device_types()


class _Thread(threading.local):
    """torch.compile guards the attribute, with the value of the thread that calls; a ContextVar it cannot read in torch 2.11."""

    def __init__(self) -> None:
        self.native = _NATIVE


_thread = _Thread()


def define(schema: str, fake: Callable) -> torch._ops.OpOverload:
    """Declares a raw operator and what its outputs look like; returns it. The compiled libraries supply its kernels."""
    name = schema.partition("(")[0]
    SCHEMAS[name] = schema
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"effdet_fast::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.effdet_fast, name).default


def is_native(x: Tensor) -> bool:
    """Whether kernels for the tensor's device were built; otherwise the reference implementation runs.

    That is also what forward-mode differentiation asks for: PyTorch knows the tangents of the reference, the kernels know none.
    """
    return device_type(x) in _thread.native and forward_ad._current_level < 0


def wants_second_derivative() -> bool:
    """Asked inside a backward: whether it must itself be differentiable (`create_graph=True`, or forward-mode differentiation).

    Then it returns the :func:`gradients` of the reference.
    """
    differentiated = torch.is_grad_enabled() or forward_ad._current_level >= 0
    return differentiated and not torch.compiler.is_compiling()


def gradients(
    reference: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    grads: Tensor | Sequence[Tensor],
) -> list[Tensor | None]:
    """What a backward returns that must itself be differentiable: for each input that needs one its gradient of `reference`."""
    with torch.enable_grad():
        # A view each, as the same tensor may be given twice, with a gradient for each place.
        views = [x.view_as(x) if need and x is not None else x for x, need in zip(inputs, needs, strict=True)]
        wanted = [x for x, need in zip(views, needs, strict=True) if need and x is not None]
        # Of PyTorch's own backwards only those that build a graph know their tangents.
        every = torch.autograd.grad(reference(*views), wanted, grads, create_graph=True, allow_unused=True)
    if not torch.is_grad_enabled():  # then nobody wants the graph; unlike `detach`, a copy keeps the tangent
        every = tuple([None if grad is None else grad.clone() for grad in every])
    found = iter(every)
    return [next(found) if need else None for need in needs]


@contextmanager
def use_reference() -> Iterator[None]:
    """Runs every op that this thread calls inside on its reference implementation, to compare with or to debug."""
    before, _thread.native = _thread.native, frozenset()
    try:
        yield
    finally:
        _thread.native = before
