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
    reference: Callable[[], Tensor | Sequence[Tensor]], inputs: Sequence[Tensor], grads: Tensor | Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """What a backward returns that must itself be differentiable: of the reference, of which PyTorch knows every derivative."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        outputs = reference()
    return torch.autograd.grad(outputs, inputs, grads, create_graph=create_graph, allow_unused=True)


@contextmanager
def use_reference() -> Iterator[None]:
    """Runs every op that this thread calls inside on its reference implementation, to compare with or to debug."""
    before, _thread.native = _thread.native, frozenset()
    try:
        yield
    finally:
        _thread.native = before
