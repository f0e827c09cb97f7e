"""EfficientNet and EfficientNet-Lite as detection backbones: one scaling rule, one table of multipliers.

Padding "same" with BatchNorm eps 1e-3 makes the TensorFlow models ("tf_" in timm), padding "symmetric" with 1e-5 timm's own.
Parameter names are those of timm's `EfficientNetFeatures`, so its weights load unchanged. Source: Tan and Le, EfficientNet
(arXiv:1905.11946).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from effdet_fast.nn import BatchNormAct2d, BlockSequence, DepthwiseConv2d, SqueezeExcite

# By padding, as the published weights were trained.
BATCH_NORM_EPS = {"same": 1e-3, "symmetric": 1e-5}
BATCH_NORM_MOMENTUM = 0.1


class Stage(NamedTuple):
    """One row of the EfficientNet-B0 table; the first block has the stride, the others 1."""

    expansion: int
    kernel_size: int
    stride: int
    repeats: int
    channels: int


STEM_CHANNELS = 32
STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(6, 3, 2, 2, 24),
    Stage(6, 5, 2, 2, 40),
    Stage(6, 3, 2, 3, 80),
    Stage(6, 5, 1, 3, 112),
    Stage(6, 5, 2, 4, 192),
    Stage(6, 3, 1, 1, 320),
)
# Names of networks between those of the table: "efficientnet:1.1,1.2" has width 1.1 and depth 1.2.
SCALED_PREFIX = "efficientnet:"
# The last stages of stride 8, 16 and 32.
FEATURE_STAGES = (2, 4, 6)


@dataclass(frozen=True)
class Variant:
    """The multipliers by which a member of the family scales the B0 table.

    Attributes:
        width: Channel multiplier.
        depth: Repeat multiplier.
        lite: EfficientNet-Lite: no squeeze-and-excitation, ReLU6, stem and first and last stage are not scaled.
    """

    width: float
    depth: float
    lite: bool = False


VARIANTS: dict[str, Variant] = {
    "efficientnet_b0": Variant(1.0, 1.0),
    "efficientnet_b1": Variant(1.0, 1.1),
    "efficientnet_b2": Variant(1.1, 1.2),
    "efficientnet_b3": Variant(1.2, 1.4),
    "efficientnet_b4": Variant(1.4, 1.8),
    "efficientnet_b5": Variant(1.6, 2.2),
    "efficientnet_b6": Variant(1.8, 2.6),
    "efficientnet_b7": Variant(2.0, 3.1),
    "efficientnet_lite0": Variant(1.0, 1.0, lite=True),
    "efficientnet_lite1": Variant(1.0, 1.1, lite=True),
    "efficientnet_lite2": Variant(1.1, 1.2, lite=True),
    "efficientnet_lite3": Variant(1.2, 1.4, lite=True),
    "efficientnet_lite4": Variant(1.4, 1.8, lite=True),
}


def scale_channels(channels: int, width: float) -> int:
    """Round `channels * width` to the nearest multiple of 8 that is not more than 10 % below."""
    scaled = channels * width
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded


def scaled_stages(variant: Variant) -> list[Stage]:
    """Scale the stage table for one variant."""
    stages = []
    for index, stage in enumerate(STAGES):
        fixed_depth = variant.lite and index in (0, len(STAGES) - 1)
        stages.append(
            stage._replace(
                repeats=stage.repeats if fixed_depth else math.ceil(stage.repeats * variant.depth),
                channels=scale_channels(stage.channels, variant.width),
            )
        )
    return stages


def variant_of(name: str) -> Variant:
    """Look up a name in `VARIANTS`, or read the multipliers from a name "efficientnet:WIDTH,DEPTH".

    Raises:
        ValueError: The name is neither.
    """
    if name in VARIANTS:
        return VARIANTS[name]
    if name.startswith(SCALED_PREFIX):
        try:
            width, depth = (float(value) for value in name.removeprefix(SCALED_PREFIX).split(","))
        except ValueError:
            width = depth = 0.0
        if 0.0 < width < math.inf and 0.0 < depth < math.inf:
            return Variant(width, depth)
    raise ValueError(
        f"EfficientNet: name must be one of {list(VARIANTS)} or {SCALED_PREFIX}WIDTH,DEPTH with positive multipliers, "
        f"got {name!r}"
    )


@dataclass(frozen=True)
class Style:
    """What all blocks of a network have in common."""

    squeeze: bool
    activation: str
    padding: str
    batch_norm_eps: float

    def norm(self, channels: int, activated: bool = True) -> BatchNormAct2d:
        activation = self.activation if activated else None
        return BatchNormAct2d(channels, self.batch_norm_eps, BATCH_NORM_MOMENTUM, activation=activation)

    def depthwise(self, channels: int, kernel_size: int, stride: int) -> DepthwiseConv2d:
        padding = "same" if self.padding == "same" else kernel_size // 2
        return DepthwiseConv2d(channels, kernel_size, stride, padding, bias=False)

    def squeeze_excite(self, channels: int, squeezed: int) -> SqueezeExcite | None:
        return SqueezeExcite(channels, squeezed, self.activation) if self.squeeze else None


class StemConv2d(nn.Conv2d):
    """3x3 convolution of stride 2; with TensorFlow's SAME padding the odd pixel goes right and below."""

    def __init__(self, in_channels: int, out_channels: int, padding: str) -> None:
        super().__init__(in_channels, out_channels, 3, stride=2, padding=0 if padding == "same" else 1, bias=False)
        self.same = padding == "same"

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.same:
            odd_h, odd_w = input.shape[2] % 2, input.shape[3] % 2
            input = F.pad(input, (odd_w, 1, odd_h, 1))
        return super().forward(input)


def add_residual(x: torch.Tensor, shortcut: torch.Tensor, drop_path: float, training: bool) -> torch.Tensor:
    """Compute `x + shortcut`; in training, drop x of a whole sample with probability `drop_path`. May write over x."""
    if drop_path == 0.0 or not training:
        return x.add_(shortcut)
    keep = x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(1.0 - drop_path).div_(1.0 - drop_path)
    return torch.addcmul(shortcut, x, keep)


class DepthwiseSeparableBlock(nn.Module):
    """Block without expansion: depthwise, BN, act, squeeze-excite, pointwise, BN."""

    def __init__(self, in_channels: int, stage: Stage, stride: int, style: Style, drop_path: float) -> None:
        super().__init__()
        self.conv_dw = style.depthwise(in_channels, stage.kernel_size, stride)
        self.bn1 = style.norm(in_channels)
        self.se = style.squeeze_excite(in_channels, round(in_channels * 0.25))
        self.conv_pw = nn.Conv2d(in_channels, stage.channels, 1, bias=False)
        self.bn2 = style.norm(stage.channels, activated=False)
        self.drop_path = drop_path
        self.has_skip = stride == 1 and in_channels == stage.channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x
        x = self.bn1(self.conv_dw(x))
        if self.se is not None:
            x = self.se(x)
        x = self.bn2(self.conv_pw(x))
        return add_residual(x, shortcut, self.drop_path, self.training) if self.has_skip else x


class InvertedResidualBlock(nn.Module):
    """MBConv: expand, BN, act, depthwise, BN, act, squeeze-excite, project, BN."""

    def __init__(self, in_channels: int, stage: Stage, stride: int, style: Style, drop_path: float) -> None:
        super().__init__()
        middle = in_channels * stage.expansion
        self.conv_pw = nn.Conv2d(in_channels, middle, 1, bias=False)
        self.bn1 = style.norm(middle)
        self.conv_dw = style.depthwise(middle, stage.kernel_size, stride)
        self.bn2 = style.norm(middle)
        # A quarter of the block's input channels, before expansion.
        self.se = style.squeeze_excite(middle, round(middle * (0.25 / stage.expansion)))
        self.conv_pwl = nn.Conv2d(middle, stage.channels, 1, bias=False)
        self.bn3 = style.norm(stage.channels, activated=False)
        self.drop_path = drop_path
        self.has_skip = stride == 1 and in_channels == stage.channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x
        x = self.bn1(self.conv_pw(x))
        x = self.bn2(self.conv_dw(x))
        if self.se is not None:
            x = self.se(x)
        x = self.bn3(self.conv_pwl(x))
        return add_residual(x, shortcut, self.drop_path, self.training) if self.has_skip else x


class EfficientNet(nn.Module):
    """EfficientNet (Tan and Le, arXiv:1905.11946) without its classifier, with timm's parameter names.

    Args:
        name: A key of `VARIANTS`, or "efficientnet:WIDTH,DEPTH" for other multipliers; see `scaled_efficientnet`.
        drop_path_rate: Stochastic depth: block i of n, counted from 0, drops its residual branch with probability
            `drop_path_rate * i / n` in training.
        padding: "same", TensorFlow's, or "symmetric".
        batch_norm_eps: eps of the BatchNorms; None takes 1e-3 for padding "same", else 1e-5.
        recompute: Keep only each block's input for the backward pass, and compute the block again there.

    Attributes:
        feature_channels: Channels of the three maps.

    Raises:
        ValueError: Unknown name or padding.
    """

    def __init__(
        self,
        name: str,
        drop_path_rate: float = 0.0,
        padding: str = "same",
        batch_norm_eps: float | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        variant = variant_of(name)
        if padding not in BATCH_NORM_EPS:
            raise ValueError(f"EfficientNet: padding must be one of {list(BATCH_NORM_EPS)}, got {padding!r}")
        eps = BATCH_NORM_EPS[padding] if batch_norm_eps is None else batch_norm_eps
        style = Style(not variant.lite, "relu6" if variant.lite else "silu", padding, eps)
        channels = STEM_CHANNELS if variant.lite else scale_channels(STEM_CHANNELS, variant.width)
        self.conv_stem = StemConv2d(3, channels, padding)
        self.bn1 = style.norm(channels)

        stages = scaled_stages(variant)
        total = sum(stage.repeats for stage in stages)
        index = 0
        self.blocks = nn.Sequential()
        for stage in stages:
            blocks = BlockSequence(recompute=recompute)
            for repeat in range(stage.repeats):
                stride = stage.stride if repeat == 0 else 1
                drop_path = drop_path_rate * index / total
                block = DepthwiseSeparableBlock if stage.expansion == 1 else InvertedResidualBlock
                blocks.append(block(channels, stage, stride, style, drop_path))
                channels = stage.channels
                index += 1
            self.blocks.append(blocks)
        self.feature_channels = tuple(stages[stage].channels for stage in FEATURE_STAGES)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize as the TensorFlow models do: convolutions normal with variance 2 / fan-out, biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                _normal(module.weight, fan_out)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, DepthwiseConv2d):
                _normal(module.weight, module.weight.shape[2] * module.weight.shape[3])

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Compute the maps [C3, C4, C5], of stride 8, 16 and 32, of images [B, 3, H, W]; each stride of 2 rounds sides up."""
        x = self.bn1(self.conv_stem(images))
        features = []
        for index, stage in enumerate(self.blocks):
            x = stage(x)
            if index in FEATURE_STAGES:
                features.append(x)
        return features


def _normal(weight: torch.Tensor, fan_out: int) -> None:
    nn.init.normal_(weight, 0.0, math.sqrt(2.0 / fan_out))
