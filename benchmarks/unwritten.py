"""Tensors of a GPU's sizes on a machine without one: with shapes and strides, and zeros that take no memory until written."""

import mmap
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
# Whose results, or their sizes, follow from values.
DECIDED_BY_VALUES = (
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.index.Tensor,
)


class Unwritten(TorchDispatchMode):
    """Inside, PyTorch's own operators compute nothing: their results have the right shapes, and are zero. Views are real, as is
    what values decide, and the operators of this package run as ever."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        aliases = [result.alias_info for result in func._schema.returns if result.alias_info]
        if any(alias.is_write for alias in aliases):
            return args[0]
        if aliases or func.namespace != "aten" or func in DECIDED_BY_VALUES:
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(torch.Tensor, _shape_of, (args, kwargs))
        if "device" in kwargs:
            kwargs["device"] = torch.device("meta")
        return tree_map_only(torch.Tensor, _zeros_like, func(*args, **kwargs))


def _shape_of(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _zeros_like(x: torch.Tensor) -> torch.Tensor:
    if x.numel() == 0:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    elements = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    memory = torch.frombuffer(mmap.mmap(-1, elements * x.element_size()), dtype=x.dtype)
    return memory.as_strided(x.shape, x.stride())
