"""Which parts of a model a run keeps fixed, and how its BatchNorm layers behave."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def batch_norms(model: nn.Module) -> Iterator[nn.modules.batchnorm._BatchNorm]:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            yield module


def set_bn_momentum(model: nn.Module, momentum: float) -> None:
    """Give all BatchNorm layers the same momentum (the share of the new batch in the running statistics)."""
    for module in batch_norms(model):
        module.momentum = momentum


def freeze(model: nn.Module, *, backbone: bool, bn: bool) -> None:
    """Exclude the backbone's parameters, or all BatchNorm weights and biases, from training."""
    if backbone:
        model.backbone.requires_grad_(False)  # type: ignore[operator, union-attr]
    if bn:
        for module in batch_norms(model):
            module.requires_grad_(False)


def enter_training(model: nn.Module, *, frozen_backbone: bool, frozen_bn: bool) -> None:
    """Training mode, except that frozen parts keep their BatchNorm statistics."""
    model.train()
    if frozen_backbone:
        model.backbone.eval()  # type: ignore[operator, union-attr]
    if frozen_bn:
        for module in batch_norms(model):
            module.eval()
