"""Depthwise and depthwise-separable convolutions as modules."""

import math

import torch
from torch import Tensor, nn

from effdet_fast.ops.depthwise_conv import Padding, depthwise_conv2d
from effdet_fast.ops.depthwise_conv_levels import depthwise_conv2d_levels


class DepthwiseConv2d(nn.Module):
    """A depthwise convolution, one filter per channel, with an optional activation before it.

    State-dict keys and shapes are those of ``nn.Conv2d(C, C, k, groups=C)``. As a function this is
    ``effdet_fast.ops.depthwise_conv2d`` (Howard et al., MobileNets, arXiv:1704.04861).

    Args:
        channels: C of the input ``[N, C, H, W]``.
        kernel_size: one number or (height, width).
        stride: one number or (vertical, horizontal).
        padding: zeros around the input: one number, (vertical, horizontal), (left, right, top, bottom), or "same", which is
            TensorFlow's: output size ``ceil(size / stride)``.
        dilation: one number or (vertical, horizontal).
        bias: learn a bias.
        prologue: activation of the input, before padding: None, "silu", "relu" or "relu6".

    Attributes:
        weight: ``[channels, 1, kh, kw]``.
        bias: ``[channels]``, or None.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: Padding = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        prologue: str | None = None,
    ):
        super().__init__()
        self.channels = channels
        self.kernel_size = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        self.prologue = prologue
        self.weight = nn.Parameter(torch.empty(channels, 1, *self.kernel_size))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias as ``nn.Conv2d`` does: uniform within ``1 / sqrt(kh * kw)``."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.kernel_size[0] * self.kernel_size[1])
            nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, prologue: str | None = None) -> "DepthwiseConv2d":
        """Make the module that computes what ``conv`` does and shares its parameters.

        Padding "same" and timm's ``Conv2dSame`` become ``padding="same"``.

        Args:
            conv: a depthwise convolution that pads with zeros.
            prologue: activation to compute before it: None, "silu", "relu" or "relu6".

        Raises:
            TypeError: ``conv`` is not an ``nn.Conv2d``.
            ValueError: ``conv`` is not depthwise, or pads with something else than zeros.
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"DepthwiseConv2d.from_conv2d: conv must be an nn.Conv2d, got {type(conv).__name__}")
        if not conv.in_channels == conv.out_channels == conv.groups:
            got = f"{conv.in_channels} inputs, {conv.out_channels} outputs, {conv.groups} groups"
            raise ValueError(f"DepthwiseConv2d.from_conv2d: conv must have one filter per channel, got {got}")
        if conv.padding_mode != "zeros":
            raise ValueError(f"DepthwiseConv2d.from_conv2d: padding_mode must be 'zeros', got {conv.padding_mode!r}")
        padding: Padding = 0 if conv.padding == "valid" else conv.padding  # type: ignore[assignment]
        if type(conv).__name__ == "Conv2dSame":  # keeps padding=0 and pads in its forward
            padding = "same"
        with torch.device("meta"):
            module = cls(
                conv.in_channels,
                conv.kernel_size,  # type: ignore[arg-type]
                conv.stride,  # type: ignore[arg-type]
                padding,
                conv.dilation,  # type: ignore[arg-type]
                conv.bias is not None,
                prologue,
            )
        module.weight = conv.weight  # type: ignore[assignment]
        module.bias = conv.bias  # type: ignore[assignment]
        return module.train(conv.training)

    def forward(self, x: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Convolve one map ``[N, C, H, W]``, or each map of a list; without dilation, a list takes one pass."""
        if isinstance(x, Tensor):
            return depthwise_conv2d(
                x, self.weight, self.bias, self.stride, self.padding, self.dilation, prologue=self.prologue
            )
        if self.dilation not in (1, (1, 1)):
            return [self.forward(each) for each in x]  # type: ignore[misc]
        return depthwise_conv2d_levels(x, self.weight, self.bias, self.stride, self.padding, prologue=self.prologue)

    def extra_repr(self) -> str:
        """Return the options that ``repr`` shows."""
        return (
            f"{self.channels}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding!r}, "
            f"dilation={self.dilation}, bias={self.bias is not None}, prologue={self.prologue!r}"
        )


class SeparableConv2d(nn.Module):
    """A depthwise-separable convolution with effdet's parameter names.

    ``conv_dw``, a `DepthwiseConv2d`, has one filter per channel and no bias. ``conv_pw``, a 1 x 1 ``nn.Conv2d``, mixes the
    channels and has the bias. As a function this is ``effdet_fast.ops.depthwise_separable_conv2d`` (Howard et al., MobileNets,
    arXiv:1704.04861).

    Args:
        in_channels: C of the input.
        out_channels: C of the output.
        kernel_size: of ``conv_dw``: one number or (height, width).
        stride: of ``conv_dw``: one number or (vertical, horizontal).
        padding: of ``conv_dw``, as for `DepthwiseConv2d`.
        bias: whether ``conv_pw`` has a bias.
        prologue: activation of the input: None, "silu", "relu" or "relu6".
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: Padding = "same",
        bias: bool = True,
        prologue: str | None = None,
    ):
        super().__init__()
        self.conv_dw = DepthwiseConv2d(in_channels, kernel_size, stride, padding, bias=False, prologue=prologue)
        self.conv_pw = nn.Conv2d(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Convolve one map ``[N, C, H, W]``, or each map of a list, whose depthwise part takes one pass."""
        y = self.conv_dw(x)
        return self.conv_pw(y) if isinstance(y, Tensor) else [self.conv_pw(each) for each in y]
