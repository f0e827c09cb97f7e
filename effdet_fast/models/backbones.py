"""Backbones by name."""

from __future__ import annotations

from torch import nn

from effdet_fast.models.config import DetectorConfig
from effdet_fast.models.efficientnet import VARIANTS, EfficientNet


def create_backbone(config: DetectorConfig) -> nn.Module:
    """The backbone of a configuration: a module that turns images [B, 3, H, W] into the maps [C3, C4, C5].

    Their channels are its attribute `feature_channels`; each stride of 2 halves a side and rounds up.

    Raises:
        ValueError: Unknown backbone, or an option it does not have.
    """
    if config.backbone not in VARIANTS:
        raise ValueError(f"create_backbone: backbone must be one of {list(VARIANTS)}, got {config.backbone!r}")
    options = (config.padding, config.backbone_bn_eps, config.frozen_batch_norm)
    if options != ("same", 1e-3, False):
        raise ValueError(
            "create_backbone: EfficientNet has padding 'same', backbone_bn_eps 1e-3 and no frozen_batch_norm, got "
            f"{options}"
        )
    return EfficientNet(config.backbone, config.drop_path_rate, recompute=config.gradient_checkpointing)
