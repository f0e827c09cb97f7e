"""The class and box heads: convolutions shared over the pyramid's levels."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import nn

from effdet_fast._choices import ACTIVATION_FUNCTIONS
from effdet_fast.models.config import DetectorConfig
from effdet_fast.models.necks.extra_levels import batch_norm
from effdet_fast.nn import SeparableConv2d

# Every class starts at this probability, so that the many background anchors don't swamp the first steps
# (Lin et al., RetinaNet, section 4.1).
PRIOR_PROBABILITY = 0.01
GROUPS = 32  # of GroupNorm, as in RetinaNet's later forms
CONV_STD = 0.01  # of the initial weights of 3x3 heads (section 4.1 as well)


class LevelsConv2d(nn.Conv2d):
    """A 3x3 convolution shared by all levels."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias)

    def forward(self, levels: list[torch.Tensor]) -> list[torch.Tensor]:  # type: ignore[override]
        return [super(LevelsConv2d, self).forward(x) for x in levels]


class Head(nn.Module):
    """A class or box head: `head_repeats` times convolution, normalization and activation, then a prediction layer.

    `head="separable"` with `head_norm="batch"` is EfficientDet's (arXiv:1911.09070): each level has BatchNorms of its own.
    `head="conv"` without normalization is RetinaNet's (arXiv:1708.02002); with "group" it is that of torchvision's
    `retinanet_resnet50_fpn_v2`, whose levels share the GroupNorms.

    Args:
        num_outputs: Outputs per anchor.
        config: Model configuration.
        prior: Initial sigmoid of the outputs; None starts the bias at 0.

    Raises:
        ValueError: GroupNorm cannot divide `fpn_channels` into groups.
    """

    def __init__(self, num_outputs: int, config: DetectorConfig, prior: float | None = None) -> None:
        super().__init__()
        channels, repeats = config.fpn_channels, config.head_repeats
        self.activation, self.norm = config.activation, config.head_norm
        conv = {"separable": SeparableConv2d, "conv": LevelsConv2d}[config.head]
        bias = config.redundant_bias or self.norm is None
        self.conv_rep = nn.ModuleList(conv(channels, channels, bias=bias) for _ in range(repeats))
        if self.norm == "batch":
            self.bn_rep = nn.ModuleList(
                nn.ModuleList(
                    nn.Sequential(OrderedDict(bn=batch_norm(channels, config.activation)))
                    for _ in range(config.num_levels)
                )
                for _ in range(repeats)
            )
        elif self.norm == "group":
            if channels % GROUPS:
                raise ValueError(f"Head: head_norm 'group' needs fpn_channels divisible by {GROUPS}, got {channels}")
            self.norm_rep = nn.ModuleList(nn.GroupNorm(GROUPS, channels) for _ in range(repeats))
        self.predict = conv(channels, num_outputs * config.anchors_per_cell, bias=True)
        self.prior = prior
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize: weights normal with variance 1 / fan-in if separable, else deviation `CONV_STD`; biases 0, or the prior."""
        for conv in [*self.conv_rep, self.predict]:
            for parameter in conv.parameters():
                if parameter.dim() == 1:
                    nn.init.zeros_(parameter)
                elif isinstance(conv, SeparableConv2d):
                    nn.init.normal_(parameter, 0.0, math.sqrt(1.0 / parameter[0].numel()))
                else:
                    nn.init.normal_(parameter, 0.0, CONV_STD)
        if self.prior is not None:
            bias = next(each for each in self.predict.parameters() if each.dim() == 1)
            nn.init.constant_(bias, -math.log((1.0 - self.prior) / self.prior))

    def forward(self, levels: list[torch.Tensor]) -> list[torch.Tensor]:
        """Predict [B, anchors_per_cell * num_outputs, H_l, W_l] for each level, the outputs of one anchor side by side."""
        for repeat, conv in enumerate(self.conv_rep):
            levels = self._normalized(repeat, conv(levels))
        return self.predict(levels)

    def _normalized(self, repeat: int, levels: list[torch.Tensor]) -> list[torch.Tensor]:
        """Normalize and activate all levels."""
        if self.norm == "batch":  # with the activation in it
            return [norm(x) for norm, x in zip(self.bn_rep[repeat], levels, strict=True)]  # type: ignore[call-overload]
        if self.norm == "group":
            levels = [self.norm_rep[repeat](x) for x in levels]
        return [ACTIVATION_FUNCTIONS[self.activation](x) for x in levels]
