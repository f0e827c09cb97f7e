"""The activations of EfficientNet and EfficientDet, where no op of ours takes them in."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def activate_(x: torch.Tensor, name: str) -> torch.Tensor:
    """Applies an activation to a tensor nobody else reads, in place where autograd allows it.

    Args:
        x: Any shape. Its content is undefined afterwards.
        name: "silu", "relu" or "relu6".

    Raises:
        ValueError: Unknown name.
    """
    if name == "silu":
        # SiLU's gradient needs its input, so writing over it would make autograd keep a copy.
        return F.silu(x, inplace=not (torch.is_grad_enabled() and x.requires_grad))
    if name == "relu6":
        return F.relu6(x, inplace=True)
    if name == "relu":
        return F.relu(x, inplace=True)
    raise ValueError(f"activate_: activation must be one of ['silu', 'relu', 'relu6'], got {name!r}")
