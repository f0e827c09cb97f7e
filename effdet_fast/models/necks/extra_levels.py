"""The pyramid's levels that are coarser than the backbone's."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from effdet_fast.models.config import DetectorConfig
from effdet_fast.nn import BatchNormAct2d
from effdet_fast.ops.fusion import same_max_pool2d

BATCH_NORM_EPS = 1e-3
BATCH_NORM_MOMENTUM = 0.01


def batch_norm(channels: int, activation: str | None = None) -> BatchNormAct2d:
    return BatchNormAct2d(channels, eps=BATCH_NORM_EPS, momentum=BATCH_NORM_MOMENTUM, activation=activation)


def plain_conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    """Make a convolution with bias and without normalization, initialized as FPNs are."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


class ProjectionConv(nn.Module):
    """1x1 convolution and BatchNorm from a backbone width to the pyramid's."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=bias)
        self.bn = batch_norm(out_channels)
        nn.init.xavier_uniform_(self.conv.weight)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x))


def projection(in_channels: int, out_channels: int, bias: bool) -> nn.Sequential:
    """A `ProjectionConv` under the name "conv", or nothing where the width already fits."""
    if in_channels == out_channels:
        return nn.Sequential()
    return nn.Sequential(OrderedDict(conv=ProjectionConv(in_channels, out_channels, bias)))


def max_pool(x: torch.Tensor, padding: str) -> torch.Tensor:
    """Max-pool 3x3 of stride 2, padded "same" as TensorFlow does or "symmetric"; sides are halved and rounded up."""
    if padding == "symmetric":
        return F.max_pool2d(x, 3, stride=2, padding=1)
    return same_max_pool2d(x)


class ExtraLevels(nn.ModuleDict):
    """The levels past C5, each half the size of the one before, made as `config.extra_levels` says.

    - "efficientdet": the first is a 1x1 convolution with BatchNorm of C5, max-pooled 3x3; each further level is the max-pooled
      one before (EfficientDet).
    - "c5", "p5": the first is a 3x3 convolution of stride 2 of C5 or P5; each further level is such a convolution of the ReLU of
      the one before (RetinaNet).
    - "pool": each level is every second pixel of the one before, from P5 on (FPN).

    Args:
        c5_channels: Channels of C5.
        names: State-dict name of each extra level's layers.
        config: Model configuration.
    """

    def __init__(self, c5_channels: int, names: list[str], config: DetectorConfig) -> None:
        super().__init__()
        self.made_from = config.extra_levels
        self.padding = config.padding
        self.names = names
        channels = config.fpn_channels if self.made_from == "p5" else c5_channels
        for name in names:
            if self.made_from == "efficientdet":
                self[name] = projection(channels, config.fpn_channels, config.redundant_bias)
            elif self.made_from != "pool":
                self[name] = plain_conv(channels, config.fpn_channels, 3, stride=2)
            channels = config.fpn_channels

    def forward(self, c5: torch.Tensor, p5: torch.Tensor) -> list[torch.Tensor]:  # type: ignore[override]
        """Compute the levels from 6 on, [B, fpn_channels, H_l, W_l] each; only "p5" and "pool" read p5."""
        levels: list[torch.Tensor] = []
        x = p5 if self.made_from in ("p5", "pool") else c5
        for name in self.names:
            if self.made_from == "efficientdet":
                x = max_pool(self[name](x), self.padding)
            elif self.made_from == "pool":
                x = F.max_pool2d(x, 1, stride=2)
            else:
                x = self[name](F.relu(x) if levels else x)
            levels.append(x)
        return levels


def extra_level_names(num_backbone_levels: int, config: DetectorConfig) -> list[str]:
    """Name the levels past the backbone's: "p6", "p7" and so on."""
    first = config.min_level + num_backbone_levels
    return [f"p{level}" for level in range(first, config.max_level + 1)]
