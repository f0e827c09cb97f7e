"""The raw operators `torch.ops.effdet_fast.*`: schemas and fake functions live in Python, kernels in the compiled libraries."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

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

    def fake_of_one_device(*arguments):
        devices = {x.device for x in tree_flatten(arguments)[0] if isinstance(x, Tensor)}
        if len(devices) > 1:  # tensors without values and others: PyTorch's dispatcher takes them for the former
            raise ValueError(f"{name}: all tensors must be on one device, got {', '.join(sorted(map(str, devices)))}")
        return fake(*arguments)

    torch.library.register_fake(f"effdet_fast::{name}", fake_of_one_device, lib=_LIBRARY)
    op = getattr(torch.ops.effdet_fast, name).default

    def on_zeros(*arguments):
        for argument, value in zip(op._schema.arguments, arguments, strict=True):
            if argument.is_write and any(x._is_zerotensor() for x in tree_flatten(value)[0] if isinstance(x, Tensor)):
                raise ValueError(f"{name}: {argument.name} must have memory to be written, got zeros without any")
        return op(*tree_map_only(Tensor, _with_memory, arguments))

    _LIBRARY.impl(name, on_zeros, "ZeroTensor")
    return op


def _with_memory(x: Tensor) -> Tensor:
    """Zeros that have no memory, as autograd passes them for gradients, in the strides that they claim."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).zero_() if x._is_zerotensor() else x


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
