"""PANet: an FPN with a bottom-up path behind it (Liu et al., Path Aggregation Network, arXiv:1803.01534)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from effdet_fast.models.config import DetectorConfig
from effdet_fast.models.necks.extra_levels import plain_conv
from effdet_fast.models.necks.fpn import Fpn
from effdet_fast.nn import WeightedFusion


class Panet(Fpn):
    """The feature pyramid of PANet: an FPN with levels P, then a bottom-up path with levels N.

    N3 is P3. For N(l+1), a 3x3 convolution of stride 2 halves N(l), the result is merged with P(l+1), and a 3x3 convolution
    follows. As in the paper, ReLU follows both convolutions. The extra levels come after N5.

    Args:
        in_channels: Channels of the backbone's feature maps, finest first.
        config: Model configuration.
    """

    def __init__(self, in_channels: tuple[int, ...], config: DetectorConfig) -> None:
        super().__init__(in_channels, config)
        channels, steps = config.fpn_channels, range(len(in_channels) - 1)
        self.down_blocks = nn.ModuleList(plain_conv(channels, channels, 3, stride=2) for _ in steps)
        self.bottom_up_fusions = nn.ModuleList(WeightedFusion(2, config.fusion) for _ in steps)
        self.bottom_up_blocks = nn.ModuleList(plain_conv(channels, channels, 3) for _ in steps)

    def forward(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Compute the levels min_level to max_level, [B, fpn_channels, H_l, W_l] each, from [C3, C4, C5]."""
        finest, *others = self.top_down(features)
        levels = [finest]
        paths = zip(others, self.down_blocks, self.bottom_up_fusions, self.bottom_up_blocks, strict=True)
        for level, down, fuse, block in paths:
            levels.append(F.relu_(block(fuse([level, F.relu_(down(levels[-1]))]))))
        return levels + self.extra_blocks(features[-1], levels[-1])
