"""The class and box heads: convolutions shared over the pyramid's levels, BatchNorms of each level's own."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import nn

from effdet_fast.models.config import DetectorConfig
from effdet_fast.models.extra_levels import batch_norm
from effdet_fast.nn import SeparableConv2d

# Every class starts at this probability, so that the many background anchors don't swamp the first steps
# (Lin et al., RetinaNet, section 4.1).
PRIOR_PROBABILITY = 0.01


class Head(nn.Module):
    """`head_repeats` times separable convolution, BatchNorm and activation, then a separable prediction layer.

    Args:
        num_outputs: Outputs per anchor.
        config: Model configuration.
        prior: Initial sigmoid of the outputs; None starts the bias at 0.
    """

    def __init__(self, num_outputs: int, config: DetectorConfig, prior: float | None = None) -> None:
        super().__init__()
        channels = config.fpn_channels
        self.conv_rep = nn.ModuleList(
            SeparableConv2d(channels, channels, 3, bias=config.redundant_bias) for _ in range(config.head_repeats)
        )
        self.bn_rep = nn.ModuleList(
            nn.ModuleList(
                nn.Sequential(OrderedDict(bn=batch_norm(channels, config.activation))) for _ in range(config.num_levels)
            )
            for _ in range(config.head_repeats)
        )
        self.predict = SeparableConv2d(channels, num_outputs * config.anchors_per_cell, 3, bias=True)
        self.prior = prior
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with variance 1 / fan-in, biases 0 except the prior of the prediction."""
        for conv in [*self.conv_rep, self.predict]:
            for weight in (conv.conv_dw.weight, conv.conv_pw.weight):
                nn.init.normal_(weight, 0.0, math.sqrt(1.0 / weight[0].numel()))
            if conv.conv_pw.bias is not None:
                nn.init.zeros_(conv.conv_pw.bias)
        if self.prior is not None and self.predict.conv_pw.bias is not None:
            nn.init.constant_(self.predict.conv_pw.bias, -math.log((1.0 - self.prior) / self.prior))

    def forward(self, levels: list[torch.Tensor]) -> list[torch.Tensor]:
        """[B, anchors_per_cell * num_outputs, H_l, W_l] per level, outputs of one anchor adjacent."""
        for conv, norms in zip(self.conv_rep, self.bn_rep, strict=True):
            levels = [norm(x) for norm, x in zip(norms, conv(levels), strict=True)]  # type: ignore[call-overload]
        return self.predict(levels)
