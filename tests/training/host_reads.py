"""What a step must not do on a GPU, found on any machine: read a result back, or bring a new constant to the device."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class NoHostRead(TorchDispatchMode):
    """Fails on what makes the host wait for a GPU, and on ``torch.tensor``, whose values a GPU would have to be sent."""

    waits = (
        "_local_scalar_dense",
        "nonzero",
        "is_nonzero",
        "masked_select",
        "unique",
        "unique_dim",
        "_unique2",
        "equal",
    )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name.startswith("index") and any(x is not None and x.dtype == torch.bool for x in _indices(args))
        assert name not in self.waits and not by_mask, f"{function} makes the host wait"
        assert name != "lift_fresh", f"{function} brings a constant from the host"
        return function(*args, **(kwargs or {}))


class NoHostTensor(TorchDispatchMode):
    """Fails on an operator that a tensor of the CPU takes part in: on a GPU it would be sent there while the host waits."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        assert all(x.device.type != "cpu" for x in tensors), f"{function} has a tensor of the host"
        return result


def _indices(args):
    return args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else []
