"""FPN: top-down feature pyramid (Lin et al., Feature Pyramid Networks, arXiv:1612.03144).

With fusion "sum" and extra levels from C5 or P5 it is the one of torchvision's RetinaNets, and has its state-dict keys.
"""

from __future__ import annotations

import torch
from torch import nn

from effdet_fast.models.config import DetectorConfig
from effdet_fast.models.necks.extra_levels import ExtraLevels, extra_level_names, plain_conv
from effdet_fast.nn import WeightedFusion


def conv_block(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    """A convolution under the name "0", as torchvision keeps it."""
    return nn.Sequential(plain_conv(in_channels, out_channels, kernel_size))


class Fpn(nn.Module):
    """The pyramid of FPN: 1x1 convolutions, coarse levels merged into finer ones, 3x3 convolutions; then the extra levels.

    It is one pass, whatever `config.fpn_cells`.

    Args:
        in_channels: Channels of the backbone's feature maps, finest first.
        config: Model configuration.
    """

    def __init__(self, in_channels: tuple[int, ...], config: DetectorConfig) -> None:
        super().__init__()
        channels = config.fpn_channels
        self.inner_blocks = nn.ModuleList(conv_block(width, channels, 1) for width in in_channels)
        self.layer_blocks = nn.ModuleList(conv_block(channels, channels, 3) for _ in in_channels)
        self.top_down_fusions = nn.ModuleList(
            WeightedFusion(2, config.fusion, ("none", "nearest")) for _ in in_channels[1:]
        )
        names = extra_level_names(len(in_channels), config)
        self.extra_blocks = ExtraLevels(in_channels[-1], names, config)

    def forward(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Compute the levels min_level to max_level, [B, fpn_channels, H_l, W_l] each, from [C3, C4, C5]."""
        levels = self.top_down(features)
        return levels + self.extra_blocks(features[-1], levels[-1])

    def top_down(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Merge the backbone's levels from the coarsest to the finest."""
        merged = [block(feature) for block, feature in zip(self.inner_blocks, features, strict=True)]
        for level in range(len(merged) - 2, -1, -1):
            lateral = merged[level]
            merged[level] = self.top_down_fusions[level]([lateral, merged[level + 1]], size=tuple(lateral.shape[2:]))
        return [block(level) for block, level in zip(self.layer_blocks, merged, strict=True)]
