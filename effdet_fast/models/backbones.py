"""Backbones by name."""

from __future__ import annotations

from torch import nn

from effdet_fast.models import efficientnet, resnet
from effdet_fast.models.config import DetectorConfig
from effdet_fast.models.efficientnet import EfficientNet
from effdet_fast.models.resnet import ResNet
from effdet_fast.nn import freeze_batch_norm


def list_backbones() -> list[str]:
    """The names `create_backbone` knows."""
    return [*efficientnet.VARIANTS, *resnet.VARIANTS]


def create_backbone(config: DetectorConfig) -> nn.Module:
    """The backbone of a configuration: a module that turns images [B, 3, H, W] into the maps [C3, C4, C5].

    Their channels are its attribute `feature_channels`; each stride of 2 halves a side and rounds up.

    Raises:
        ValueError: Unknown backbone, or an option it does not have.
    """
    name, recompute = config.backbone, config.gradient_checkpointing
    eps = {} if config.backbone_bn_eps is None else {"batch_norm_eps": config.backbone_bn_eps}
    backbone: nn.Module
    if name in efficientnet.VARIANTS:
        options = (config.padding, config.backbone_bn_eps)
        if options not in (("same", None), ("same", 1e-3)):
            raise ValueError(
                f"create_backbone: EfficientNet has padding 'same' and backbone_bn_eps 1e-3, got {options}"
            )
        backbone = EfficientNet(name, config.drop_path_rate, recompute=recompute)
    elif name in resnet.VARIANTS:
        backbone = ResNet(name, recompute=recompute, **eps)
    else:
        raise ValueError(f"create_backbone: backbone must be one of {list_backbones()}, got {name!r}")
    return freeze_batch_norm(backbone) if config.frozen_batch_norm else backbone
