"""Necks by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from effdet_fast.models.bifpn import BiFpn
from effdet_fast.models.config import DetectorConfig

NECKS: dict[str, Callable[[tuple[int, ...], DetectorConfig], nn.Module]] = {"bifpn": BiFpn}


def create_neck(in_channels: tuple[int, ...], config: DetectorConfig) -> nn.Module:
    """The neck of a configuration: a module that turns [C3, C4, C5] into `config.num_levels` maps of `fpn_channels`.

    Args:
        in_channels: Channels of the backbone's maps, finest first.
        config: Model configuration.

    Raises:
        ValueError: Unknown neck, or extra levels it does not make.
    """
    if config.neck not in NECKS:
        raise ValueError(f"create_neck: neck must be one of {list(NECKS)}, got {config.neck!r}")
    if config.extra_levels != "efficientdet":
        raise ValueError(f"create_neck: {config.neck} makes extra_levels 'efficientdet', got {config.extra_levels!r}")
    return NECKS[config.neck](in_channels, config)
