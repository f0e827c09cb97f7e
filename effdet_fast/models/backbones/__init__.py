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
    """The names `create_backbone` knows, besides those with multipliers or of timm's models."""
    return [*efficientnet.VARIANTS, *resnet.VARIANTS]


def create_backbone(config: DetectorConfig) -> nn.Module:
    """The backbone of a configuration: a module that turns images [B, 3, H, W] into the maps [C3, C4, C5].

    Names are those of `list_backbones()`, "efficientnet:WIDTH,DEPTH" with multipliers (see `scaled_efficientnet`), and
    "timm:NAME" for any model of timm with `features_only`. Channels of the maps are the attribute `feature_channels`; each
    stride of 2 halves a side and rounds up. Padding and drop path are EfficientNet's; others have their own.

    Raises:
        ValueError: Unknown backbone, or timm is needed and not installed.
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
