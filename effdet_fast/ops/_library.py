"""The raw operators `torch.ops.effdet_fast.*`: schemas and fake functions live in Python, kernels in the compiled libraries."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_map_only

from effdet_fast._libraries import native_device_types, warn_if_missing
from effdet_fast.ops._arguments import device_type

_LIBRARY = torch.library.Library("effdet_fast", "FRAGMENT")
SCHEMAS: dict[str, str] = {}
_NATIVE = native_device_types()
_Result = TypeVar("_Result")


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

    def fake_of_one_device(*arguments):
        devices = {x.device for x in tree_flatten(arguments)[0] if isinstance(x, Tensor)}
        if len(devices) > 1:  # tensors without values and others: PyTorch's dispatcher takes them for the former
            raise ValueError(f"{name}: all tensors must be on one device, got {', '.join(sorted(map(str, devices)))}")
        return fake(*arguments)

    torch.library.register_fake(f"effdet_fast::{name}", fake_of_one_device, lib=_LIBRARY)
    op = getattr(torch.ops.effdet_fast, name).default

    def on_zeros(*arguments):
        for argument, value in zip(op._schema.arguments, arguments, strict=False):  # defaults are left out
            if argument.is_write and any(x._is_zerotensor() for x in tree_flatten(value)[0] if isinstance(x, Tensor)):
                raise ValueError(f"{name}: {argument.name} must have memory to be written, got zeros without any")
        return op(*tree_map_only(Tensor, _with_memory, arguments))

    _LIBRARY.impl(name, on_zeros, "ZeroTensor")
    return op


def _with_memory(x: Tensor) -> Tensor:
    """Zeros that have no memory, as autograd passes them for gradients, in the strides that they claim."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).zero_() if x._is_zerotensor() else x


def is_native(x: Tensor) -> bool:
    """Whether kernels for the tensor's device were built; otherwise the reference implementation runs.

    That is also what forward-mode differentiation asks for: PyTorch knows the tangents of the reference, the kernels know none.
    """
    native = _thread.native
    has_kernels = device_type(x) in native or (bool(native) and warn_if_missing(device_type(x)))
    return has_kernels and forward_ad._current_level < 0


def wants_second_derivative() -> bool:
    """Asked inside a backward: whether it must itself be differentiable (`create_graph=True`, or forward-mode differentiation).

    Then it returns the `gradients` of the reference.
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


def explained(explain: Callable[[], object], op: Callable[..., _Result], *arguments) -> _Result:
    """`op(*arguments)`. Where a kernel refuses what it finds in the tensors, `explain` is to raise the error that tells where."""
    try:
        return op(*arguments)
    except RuntimeError as error:
        refused = error
    try:
        explain()  # outside of the handler, whose error would be told too
        raise refused
    finally:
        del refused  # whose traceback holds this frame, and so the arguments


@contextmanager
def use_reference() -> Iterator[None]:
    """Runs every op that this thread calls inside on its reference implementation, to compare with or to debug."""
    before, _thread.native = _thread.native, frozenset()
    try:
        yield
    finally:
        _thread.native = before
