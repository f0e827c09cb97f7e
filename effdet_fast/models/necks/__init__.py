"""Necks by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from effdet_fast.models.config import DetectorConfig
from effdet_fast.models.necks.bifpn import BiFpn
from effdet_fast.models.necks.fpn import Fpn
from effdet_fast.models.necks.nas_fpn import NasFpn
from effdet_fast.models.necks.panet import Panet

NECKS: dict[str, Callable[[tuple[int, ...], DetectorConfig], nn.Module]] = {
    "fpn": Fpn,
    "panet": Panet,
    "nas_fpn": NasFpn,
    "bifpn": BiFpn,
}


def list_necks() -> list[str]:
    """List the names that `create_neck` knows."""
    return list(NECKS)


def create_neck(in_channels: tuple[int, ...], config: DetectorConfig) -> nn.Module:
    """Build the neck of a configuration.

    Args:
        in_channels: Channels of the backbone's maps, finest first.
        config: Model configuration.

    Returns:
        A module that turns the maps [C3, C4, C5] into `config.num_levels` maps of `config.fpn_channels` channels.

    Raises:
        ValueError: The neck is unknown, or does not make these levels.
    """
    if config.neck not in list_necks():
        raise ValueError(f"create_neck: neck must be one of {list_necks()}, got {config.neck!r}")
    return NECKS[config.neck](in_channels, config)
