"""Squeeze-and-excite as a module."""

from torch import Tensor, nn

from effdet_fast.ops.squeeze_excite import squeeze_excite


class SqueezeExcite(nn.Module):
    """:func:`effdet_fast.ops.squeeze_excite` with its parameters, named as in timm and effdet.

    ``conv_reduce`` and ``conv_expand`` are ordinary 1 x 1 convolutions, so that what initializes those initializes these; only
    their parameters are used.

    Args:
        channels: C of the input.
        squeezed: channels between the two convolutions.
        activation: "silu", "relu" or "relu6", between the two.
        bias: whether the convolutions have one.
    """

    def __init__(self, channels: int, squeezed: int, activation: str = "silu", bias: bool = True):
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, squeezed, 1, bias=bias)
        self.conv_expand = nn.Conv2d(squeezed, channels, 1, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        reduce, expand = self.conv_reduce, self.conv_expand
        return squeeze_excite(x, reduce.weight, reduce.bias, expand.weight, expand.bias, activation=self.activation)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"
