"""The raw operators `torch.ops.effdet_fast.*`: schemas and fake functions live in Python, kernels in the compiled libraries."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from effdet_fast._libraries import native_device_types, warn_if_missing
from effdet_fast.ops._arguments import device_type

_LIBRARY = torch.library.Library("effdet_fast", "FRAGMENT")
SCHEMAS: dict[str, str] = {}
_native = native_device_types()


def define(schema: str, fake: Callable) -> torch._ops.OpOverload:
    """Declares a raw operator and what its outputs look like; returns it. The compiled libraries supply its kernels."""
    name = schema.partition("(")[0]
    SCHEMAS[name] = schema
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"effdet_fast::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.effdet_fast, name).default


def is_native(x: Tensor) -> bool:
    """Whether kernels for the tensor's device were built; otherwise the reference implementation runs."""
    return device_type(x) in _native or (bool(_native) and warn_if_missing(device_type(x)))


def wants_second_derivative() -> bool:
    """Asked inside a backward: whether it must itself be differentiable (`create_graph=True`). Then it runs on the reference."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


@contextmanager
def use_reference() -> Iterator[None]:
    """Runs every op inside on its reference implementation, to compare with or to debug."""
    global _native
    before, _native = _native, frozenset()
    try:
        yield
    finally:
        _native = before
