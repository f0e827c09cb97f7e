"""BiFPN: bidirectional, weighted feature pyramid (Tan, Pang and Le, EfficientDet, arXiv:1911.09070).

Module names are chosen so that the state dict has effdet's keys.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import nn

from effdet_fast.models.config import DetectorConfig
from effdet_fast.models.necks.extra_levels import ExtraLevels, batch_norm, max_pool, projection
from effdet_fast.nn import BlockSequence, SeparableConv2d, WeightedFusion


class NodeInput(NamedTuple):
    """Which feature a node reads, and how it is brought to the node's size."""

    offset: int
    resample: str


def bifpn_nodes(num_levels: int) -> list[list[NodeInput]]:
    """List the nodes of one BiFPN cell in order of computation.

    Features 0 to num_levels - 1 are the cell's inputs, finest first; node i adds feature num_levels + i. The last
    num_levels features are the cell's outputs.
    """
    level_features = [[level] for level in range(num_levels)]
    nodes: list[list[NodeInput]] = []

    def add(level: int, inputs: list[NodeInput]) -> None:
        level_features[level].append(num_levels + len(nodes))
        nodes.append(inputs)

    for level in range(num_levels - 2, -1, -1):
        coarser = NodeInput(level_features[level + 1][-1], "nearest")
        add(level, [NodeInput(level_features[level][-1], "none"), coarser])
    for level in range(1, num_levels):
        finer = NodeInput(level_features[level - 1][-1], "max_pool")
        add(level, [*(NodeInput(offset, "none") for offset in level_features[level]), finer])
    return nodes


class NodeFusion(WeightedFusion):
    """Weighted fusion of a node's inputs, each projected to the pyramid's width first where it must be."""

    def __init__(self, inputs: list[NodeInput], in_channels: list[int], config: DetectorConfig) -> None:
        # The fused op pools with TensorFlow's padding; pooling with the other one comes before it.
        symmetric = config.padding == "symmetric"
        self.pooled = [symmetric and entry.resample == "max_pool" for entry in inputs]
        resample = ["none" if pooled else entry.resample for entry, pooled in zip(inputs, self.pooled, strict=True)]
        super().__init__(len(inputs), method=config.fusion, resample=resample, activation=config.activation)
        self.offsets = [entry.offset for entry in inputs]
        self.resample = nn.ModuleDict(
            {
                str(offset): projection(channels, config.fpn_channels, config.redundant_bias)
                for offset, channels in zip(self.offsets, in_channels, strict=True)
            }
        )

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
        """Fused and activated [B, C, H, W] from all features computed so far; the first input has the node's size."""
        projections = self.resample.values()
        inputs = [project(features[offset]) for offset, project in zip(self.offsets, projections, strict=True)]
        inputs = [max_pool(x, "symmetric") if pooled else x for x, pooled in zip(inputs, self.pooled, strict=True)]
        return super().forward(inputs, size=tuple(inputs[0].shape[2:]))


class NodeConv(SeparableConv2d):
    """Separable convolution of an activated fusion, and its BatchNorm."""

    def __init__(self, config: DetectorConfig) -> None:
        channels = config.fpn_channels
        super().__init__(channels, channels, 3, bias=config.redundant_bias)
        self.bn = batch_norm(channels)
        # Fans as the TensorFlow model counts them: a depthwise filter sees and feeds 9 values.
        nn.init.uniform_(self.conv_dw.weight, -((3 / 9) ** 0.5), (3 / 9) ** 0.5)
        nn.init.xavier_uniform_(self.conv_pw.weight)
        if self.conv_pw.bias is not None:
            nn.init.zeros_(self.conv_pw.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.bn(super().forward(x))


class Node(nn.Module):
    """One BiFPN node: fuse, activate, convolve, normalize."""

    def __init__(self, inputs: list[NodeInput], in_channels: list[int], config: DetectorConfig) -> None:
        super().__init__()
        self.combine = NodeFusion(inputs, in_channels, config)
        self.after_combine = nn.Sequential(OrderedDict(conv=NodeConv(config)))

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        return self.after_combine(self.combine(features))


class BiFpnCell(nn.Module):
    """One round of top-down and bottom-up nodes over all levels.

    Args:
        in_channels: Channels of each level, finest first.
        config: Model configuration.
    """

    def __init__(self, in_channels: list[int], config: DetectorConfig) -> None:
        super().__init__()
        self.num_levels = config.num_levels
        nodes = bifpn_nodes(config.num_levels)
        channels = in_channels + [config.fpn_channels] * len(nodes)
        self.fnode = nn.ModuleList(Node(node, [channels[entry.offset] for entry in node], config) for node in nodes)

    def forward(self, levels: list[torch.Tensor]) -> list[torch.Tensor]:
        features = list(levels)
        for node in self.fnode:
            features.append(node(features))
        return features[-self.num_levels :]


class BiFpn(nn.Module):
    """The neck of EfficientDet: levels coarser than the backbone's are added, then `config.fpn_cells` cells fuse all levels.

    Extra levels "p5" and "pool" are made from C5 after a lateral convolution.

    Args:
        in_channels: Channels of the backbone's feature maps, finest first.
        config: Model configuration.
    """

    def __init__(self, in_channels: tuple[int, ...], config: DetectorConfig) -> None:
        super().__init__()
        width, num_extra = config.fpn_channels, config.num_levels - len(in_channels)
        # effdet's keys count all levels from the finest.
        names = [str(len(in_channels) + index) for index in range(num_extra)]
        self.resample = ExtraLevels(in_channels[-1], names, config)
        self.lateral = None
        if config.extra_levels in ("p5", "pool"):
            self.lateral = projection(in_channels[-1], width, config.redundant_bias)
        channels = [*in_channels, *[width] * num_extra]
        self.cell = BlockSequence(recompute=config.gradient_checkpointing)
        for _ in range(config.fpn_cells):
            self.cell.append(BiFpnCell(channels, config))
            channels = [width] * config.num_levels

    def forward(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Compute the levels min_level to max_level, [B, fpn_channels, H_l, W_l] each, from [C3, C4, C5]."""
        c5 = features[-1]
        p5 = c5 if self.lateral is None else self.lateral(c5)
        return self.cell(features + self.resample(c5, p5))
