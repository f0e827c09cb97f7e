"""NAS-FPN: the cell found by architecture search, stacked (Ghiasi et al., NAS-FPN, arXiv:1904.07392)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from effdet_fast.models.config import DetectorConfig
from effdet_fast.models.necks.extra_levels import ExtraLevels, ProjectionConv, batch_norm, extra_level_names
from effdet_fast.nn import BlockSequence, WeightedFusion


class Merge(NamedTuple):
    """One merging cell: the two features that it reads and the level of its result.

    Features 0 to 4 are levels 3 to 7; merge i adds feature 5 + i.
    """

    name: str
    first: int
    second: int
    level: int
    gated: bool
    convolved: bool = True


# The published cell. A gated merge is global pooling: first * sigmoid(mean(second)) + second.
MERGES = (
    Merge("gp_64_4", 3, 1, 4, gated=True),
    Merge("sum_44_4", 5, 1, 4, gated=False),
    Merge("sum_43_3", 6, 0, 3, gated=False),
    Merge("sum_34_4", 7, 6, 4, gated=False),
    Merge("gp_43_5", 8, 7, 5, gated=True, convolved=False),
    Merge("sum_55_5", 2, 9, 5, gated=False),
    Merge("gp_54_7", 10, 6, 7, gated=True, convolved=False),
    Merge("sum_77_7", 4, 11, 7, gated=False),
    Merge("gp_75_6", 12, 10, 6, gated=True),
)
# Where the cell's outputs, levels 3 to 7, are among the features.
OUTPUTS = (7, 8, 10, 13, 12)
LEVELS = (3, 7)


def feature_levels() -> list[int]:
    """List the level of each feature of a cell."""
    return [*range(LEVELS[0], LEVELS[1] + 1), *(merge.level for merge in MERGES)]


class MergingCell(nn.Module):
    """A merge of two features at one size; then, if `merge.convolved`, ReLU, 3x3 convolution and BatchNorm.

    Args:
        merge: What to merge.
        levels: Levels of the first and the second feature.
        config: Model configuration.
    """

    def __init__(self, merge: Merge, levels: tuple[int, int], config: DetectorConfig) -> None:
        super().__init__()
        self.gated = merge.gated
        # A coarser feature is read at its nearest pixel, a finer one max-pooled before.
        self.pools = tuple(2 ** max(merge.level - level, 0) for level in levels)
        resample = ["nearest" if level > merge.level else "none" for level in levels]
        activation = "relu" if merge.convolved else None
        self.combine = WeightedFusion(2, config.fusion, resample, activation)
        self.conv = None
        if merge.convolved:
            channels = config.fpn_channels
            self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=config.redundant_bias)
            self.bn = batch_norm(channels)
            nn.init.kaiming_uniform_(self.conv.weight, a=1)
            if self.conv.bias is not None:
                nn.init.zeros_(self.conv.bias)

    def forward(self, first: torch.Tensor, second: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Merge to [B, C, H, W] of the given size (H, W)."""
        first, second = (_pool(x, pool) for x, pool in zip((first, second), self.pools, strict=True))
        if self.gated:
            # Before the first feature is enlarged: one factor for a whole map changes nothing about which pixels are read.
            first = first * second.mean((2, 3), keepdim=True).sigmoid()
        x = self.combine([first, second], size=size)
        return x if self.conv is None else self.bn(self.conv(x))


def _pool(x: torch.Tensor, side: int) -> torch.Tensor:
    """Max-pool side x side pixels; the last ones of a size that is no multiple are pooled from fewer."""
    return x if side == 1 else F.max_pool2d(x, side, stride=side, ceil_mode=True)


class NasFpnCell(nn.Module):
    """The nine merges; five levels in, five levels out."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        levels = feature_levels()
        self.merges = nn.ModuleDict(
            {merge.name: MergingCell(merge, (levels[merge.first], levels[merge.second]), config) for merge in MERGES}
        )

    def forward(self, levels: list[torch.Tensor]) -> list[torch.Tensor]:
        features = list(levels)
        for merge in MERGES:
            size = tuple(levels[merge.level - LEVELS[0]].shape[2:])
            features.append(self.merges[merge.name](features[merge.first], features[merge.second], size))
        return [features[index] for index in OUTPUTS]


class NasFpn(nn.Module):
    """The neck of NAS-FPN: lateral 1x1 convolutions with BatchNorm, the extra levels, then `config.fpn_cells` cells.

    Extra levels "p5" and "pool" are made from C5 after its lateral convolution.

    Args:
        in_channels: Channels of the backbone's feature maps, finest first.
        config: Model configuration.

    Raises:
        ValueError: The configuration has other levels than 3 to 7.
    """

    def __init__(self, in_channels: tuple[int, ...], config: DetectorConfig) -> None:
        super().__init__()
        if (config.min_level, config.max_level) != LEVELS:
            raise ValueError(
                f"NasFpn: the published cell has levels {LEVELS[0]} to {LEVELS[1]}, got {config.min_level} to "
                f"{config.max_level}"
            )
        self.lateral = nn.ModuleList(
            ProjectionConv(width, config.fpn_channels, config.redundant_bias) for width in in_channels
        )
        self.extra_blocks = ExtraLevels(in_channels[-1], extra_level_names(len(in_channels), config), config)
        self.cell = BlockSequence(
            *(NasFpnCell(config) for _ in range(config.fpn_cells)), recompute=config.gradient_checkpointing
        )

    def forward(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Compute the levels 3 to 7, [B, fpn_channels, H_l, W_l] each, from [C3, C4, C5]."""
        levels = [project(feature) for project, feature in zip(self.lateral, features, strict=True)]
        return self.cell(levels + self.extra_blocks(features[-1], levels[-1]))
