"""Depthwise convolutions: PyTorch's, and timm's that pad as TensorFlow does."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from effdet_fast.acceleration.swap import Swap, is_exactly, is_one_of
from effdet_fast.ops.depthwise_conv import Padding, depthwise_conv2d

KERNELS = ((3, 3), (5, 5))
STRIDES = ((1, 1), (2, 2))


def is_depthwise(obj: Any) -> bool:
    """Whether it is a convolution with one or more filters of each channel alone."""
    return isinstance(obj, nn.Conv2d) and 1 < obj.groups == obj.in_channels and max(obj.kernel_size) > 1


def padding_of(conv: nn.Conv2d) -> Padding:
    """The padding as the op takes it."""
    if is_one_of(conv, "timm.Conv2dSame"):
        return "same"
    return 0 if conv.padding == "valid" else conv.padding  # type: ignore[return-value]


class DepthwiseConv(Swap):
    """One pass, and no padded copy."""

    family, replacement = "depthwise_conv", "depthwise_conv2d"

    @classmethod
    def fits(cls, obj: Any) -> bool:
        return is_depthwise(obj)

    @classmethod
    def reason_against(cls, obj: nn.Conv2d) -> str | None:
        if not (is_exactly(obj, nn.Conv2d) or is_one_of(obj, "timm.Conv2dSame")):
            return "an unknown kind of Conv2d"
        if obj.out_channels != obj.in_channels:
            return f"{obj.out_channels // obj.in_channels} filters per channel"
        if max(obj.dilation) > 1:
            return f"dilation {max(obj.dilation)}"
        if obj.padding_mode != "zeros":
            return f"padding_mode {obj.padding_mode!r}"
        if obj.kernel_size not in KERNELS:
            return f"no kernel for {obj.kernel_size[0]} x {obj.kernel_size[1]}"
        if obj.stride not in STRIDES:
            return f"no kernel for stride {obj.stride}"
        return None

    def forward(self, x: Tensor) -> Tensor:
        return convolve(self, x)  # type: ignore[arg-type]


def convolve(conv: nn.Conv2d, x: Tensor, prologue: str | None = None) -> Tensor:
    """The convolution of `prologue(x)`, by the op."""
    return depthwise_conv2d(x, conv.weight, conv.bias, conv.stride, padding_of(conv), prologue=prologue)  # type: ignore[arg-type]
