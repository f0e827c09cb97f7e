"""Which parameters are optimised how, and how a step with non-finite gradients is skipped on the device."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Decay for convolution weights only: biases, BatchNorm and edge weights are vectors or scalars and get none."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("train: every parameter is frozen, so there is nothing to train")
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def create_optimizer(
    model: nn.Module, *, name: str, lr: float, weight_decay: float, momentum: float = 0.9
) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum ("sgd") or AdamW ("adamw"), in their fused forms.

    The fused forms take a device-side flag that skips the step (`set_skip_flag`), so a bad batch costs no host
    synchronisation.
    """
    groups = parameter_groups(model, weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=True)
    if name != "sgd":
        raise ValueError(f"train: optimizer must be one of sgd, adamw, got {name!r}")
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=True, fused=True)
    # The fused kernel allocates the momentum without filling it and returns early when the very first step is
    # skipped, which is the rule with fp16; zeros give the same first step and cannot be garbage.
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def set_skip_flag(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """Make the next steps do nothing where `skip`, a 0-d float tensor on the parameters' device, is 1."""
    optimizer.found_inf = skip  # type: ignore[attr-defined]


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients to a total norm of at most `max_norm` (0: leave them) and return the norm before, 0-d."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
