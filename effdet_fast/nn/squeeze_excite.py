"""Squeeze-and-excite as a module."""

from torch import Tensor, nn

from effdet_fast.ops.squeeze_excite import squeeze_excite


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation, each channel scaled by a gate, with the parameter names of timm and effdet.

    ``conv_reduce`` and ``conv_expand`` are plain 1 x 1 convolutions, so that whatever initializes an ``nn.Conv2d`` initializes
    them. Only their parameters are used, by ``effdet_fast.ops.squeeze_excite`` (Hu et al., Squeeze-and-Excitation Networks,
    arXiv:1709.01507).

    Args:
        channels: C of the input.
        squeezed: channels between the two convolutions.
        activation: activation between the two: "silu", "relu" or "relu6".
        bias: whether the convolutions have a bias.
    """

    def __init__(self, channels: int, squeezed: int, activation: str = "silu", bias: bool = True):
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, squeezed, 1, bias=bias)
        self.conv_expand = nn.Conv2d(squeezed, channels, 1, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels of ``[N, C, H, W]``."""
        reduce, expand = self.conv_reduce, self.conv_expand
        return squeeze_excite(x, reduce.weight, reduce.bias, expand.weight, expand.bias, activation=self.activation)

    def extra_repr(self) -> str:
        """Return the options that ``repr`` shows."""
        return f"activation={self.activation!r}"
