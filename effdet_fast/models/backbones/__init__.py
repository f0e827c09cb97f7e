"""Backbones by name."""

from __future__ import annotations

from torch import nn

from effdet_fast.models.backbones import efficientnet, resnet
from effdet_fast.models.backbones.efficientnet import EfficientNet
from effdet_fast.models.backbones.resnet import ResNet
from effdet_fast.models.backbones.timm import PREFIX, timm_backbone
from effdet_fast.models.config import DetectorConfig
from effdet_fast.nn import freeze_batch_norm


def list_backbones() -> list[str]:
    """List the names that `create_backbone` knows, besides those with multipliers and those of timm's models."""
    return [*efficientnet.VARIANTS, *resnet.VARIANTS]


def create_backbone(config: DetectorConfig) -> nn.Module:
    """Build the backbone of a configuration.

    `config.backbone` is one of `list_backbones()`, "efficientnet:WIDTH,DEPTH" with multipliers (see `scaled_efficientnet`), or
    "timm:NAME" for any model of timm with `features_only`. `config.padding` and `config.drop_path_rate` are EfficientNet's alone.

    Args:
        config: Model configuration.

    Returns:
        A module that turns images [B, 3, H, W] into the maps [C3, C4, C5], whose sides are halved and rounded up at each stride
        of 2. Its attribute `feature_channels` has their channels.

    Raises:
        ValueError: The backbone is unknown, or it needs timm, which is not installed.
    """
    name, eps, recompute = str(config.backbone), config.backbone_bn_eps, config.gradient_checkpointing
    backbone: nn.Module
    if name.startswith(PREFIX):
        backbone = timm_backbone(name.removeprefix(PREFIX), config.image_size, eps, config.frozen_batch_norm)
        if recompute:
            backbone.set_grad_checkpointing()  # type: ignore[operator]
        return backbone
    if name in resnet.VARIANTS:
        backbone = ResNet(name, batch_norm_eps=1e-5 if eps is None else eps, recompute=recompute)
    elif name in efficientnet.VARIANTS or name.startswith(efficientnet.SCALED_PREFIX):
        backbone = EfficientNet(name, config.drop_path_rate, config.padding, eps, recompute)
    else:
        more = f"{efficientnet.SCALED_PREFIX}WIDTH,DEPTH or {PREFIX}NAME"
        raise ValueError(
            f"create_backbone: backbone must be one of {list_backbones()}, {more}, got {config.backbone!r}"
        )
    return freeze_batch_norm(backbone) if config.frozen_batch_norm else backbone
