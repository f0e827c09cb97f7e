"""ResNet as a detection backbone.

Parameter names are those of torchvision's `resnet*` without the classifier, so its weights load unchanged.
Source: He et al., Deep Residual Learning (arXiv:1512.03385), with a bottleneck's stride in its 3x3 convolution.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from effdet_fast.nn import BatchNormAct2d, BlockSequence


class Variant(NamedTuple):
    """Blocks in each of the four stages, and which kind they are."""

    repeats: tuple[int, int, int, int]
    bottleneck: bool


VARIANTS: dict[str, Variant] = {
    "resnet18": Variant((2, 2, 2, 2), bottleneck=False),
    "resnet34": Variant((3, 4, 6, 3), bottleneck=False),
    "resnet50": Variant((3, 4, 6, 3), bottleneck=True),
    "resnet101": Variant((3, 4, 23, 3), bottleneck=True),
    "resnet152": Variant((3, 8, 36, 3), bottleneck=True),
}
STEM_CHANNELS = 64
STAGE_CHANNELS = (64, 128, 256, 512)

Norm = partial[BatchNormAct2d]


def conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)


def projection(in_channels: int, out_channels: int, stride: int, norm: Norm) -> nn.Sequential | None:
    """Make the 1x1 convolution and BatchNorm of a shortcut, or None where the shape stays."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(conv(in_channels, out_channels, 1, stride), norm(out_channels))


def add_shortcut(x: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
    """Compute `relu(x + shortcut)` in place of x, which the BatchNorm before it does not keep for the backward pass."""
    return x.add_(shortcut).relu_()


class BasicBlock(nn.Module):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, channels, 3, stride)
        self.bn1 = norm(channels, activation="relu")
        self.conv2 = conv(channels, channels, 3)
        self.bn2 = norm(channels)
        self.downsample = projection(in_channels, channels, stride, norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn1(self.conv1(x))
        return add_shortcut(self.bn2(self.conv2(x)), shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3 and widening 1x1 convolution."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, norm: Norm) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = conv(in_channels, channels, 1)
        self.bn1 = norm(channels, activation="relu")
        self.conv2 = conv(channels, channels, 3, stride)
        self.bn2 = norm(channels, activation="relu")
        self.conv3 = conv(channels, out_channels, 1)
        self.bn3 = norm(out_channels)
        self.downsample = projection(in_channels, out_channels, stride, norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn1(self.conv1(x))
        x = self.bn2(self.conv2(x))
        return add_shortcut(self.bn3(self.conv3(x)), shortcut)


class ResNet(nn.Module):
    """ResNet (He et al., arXiv:1512.03385) without its classifier, with torchvision's parameter names.

    Args:
        name: A key of `VARIANTS`.
        batch_norm_eps: eps of the BatchNorms.
        recompute: Keep only each block's input for the backward pass, and compute the block again there.

    Attributes:
        feature_channels: Channels of the three maps.

    Raises:
        ValueError: Unknown name.
    """

    def __init__(self, name: str, batch_norm_eps: float = 1e-5, recompute: bool = False) -> None:
        super().__init__()
        if name not in VARIANTS:
            raise ValueError(f"ResNet: name must be one of {list(VARIANTS)}, got {name!r}")
        repeats, bottleneck = VARIANTS[name]
        block = Bottleneck if bottleneck else BasicBlock
        norm = partial(BatchNormAct2d, eps=batch_norm_eps)
        self.conv1 = conv(3, STEM_CHANNELS, 7, stride=2)
        self.bn1 = norm(STEM_CHANNELS, activation="relu")
        in_channels = STEM_CHANNELS
        stages = []
        for stage, channels in enumerate(STAGE_CHANNELS):
            blocks = BlockSequence(recompute=recompute)
            for index in range(repeats[stage]):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(block(in_channels, channels, stride, norm))
                in_channels = channels * block.expansion
            stages.append(blocks)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.feature_channels = tuple(channels * block.expansion for channels in STAGE_CHANNELS[1:])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize convolutions: normal with variance 2 / fan-out."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Compute the maps [C3, C4, C5], of stride 8, 16 and 32, of images [B, 3, H, W]; each stride of 2 rounds sides up."""
        x = self.bn1(self.conv1(images))
        x = self.layer1(F.max_pool2d(x, 3, stride=2, padding=1))
        c3 = self.layer2(x)
        c4 = self.layer3(c3)
        return [c3, c4, self.layer4(c4)]
