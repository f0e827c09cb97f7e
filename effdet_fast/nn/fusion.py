"""Weighted feature fusion as a module."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from effdet_fast._choices import ACTIVATIONS, FUSION_METHODS, MAX_FUSION_INPUTS, RESAMPLES
from effdet_fast.ops._arguments import check_choice
from effdet_fast.ops.fusion import weighted_fusion


class WeightedFusion(nn.Module):
    """A weighted sum of feature maps whose weights are learned: `effdet_fast.ops.weighted_fusion` with fixed options.

    The node of a BiFPN (Tan, Pang and Le, EfficientDet, arXiv:1911.09070, section 3.3), like effdet's ``FpnCombine``.

    Args:
        num_inputs: 2 to 4.
        method: how weights are normalized: "fast" (ReLU, then divided by their sum), "softmax", or "sum" (no weights).
        resample: how each input is brought to the size of the sum: "none", "nearest" or "max_pool"; default "none" for all.
        activation: activation of the sum: None, "silu", "relu" or "relu6".
        eps: added to the sum of the weights by "fast", >= 0.

    Attributes:
        edge_weights: ``[num_inputs]``, initially ones; None for method "sum".

    Raises:
        ValueError: an option is unknown or does not fit ``num_inputs``.
    """

    edge_weights: nn.Parameter | None

    def __init__(
        self,
        num_inputs: int,
        method: str = "fast",
        resample: Sequence[str] | None = None,
        activation: str | None = None,
        eps: float = 1e-4,
    ):
        super().__init__()
        name = type(self).__name__
        if not 2 <= num_inputs <= MAX_FUSION_INPUTS:
            raise ValueError(f"{name}: num_inputs must be 2 to {MAX_FUSION_INPUTS}, got {num_inputs}")
        check_choice(name, "method", method, FUSION_METHODS)
        check_choice(name, "activation", activation, ACTIVATIONS)
        resample = ("none",) * num_inputs if resample is None else tuple(resample)
        if len(resample) != num_inputs:
            raise ValueError(f"{name}: resample must have {num_inputs} entries, got {len(resample)}")
        for i, how in enumerate(resample):
            check_choice(name, f"resample[{i}]", how, RESAMPLES)
        if not eps >= 0:
            raise ValueError(f"{name}: eps must be >= 0, got {eps}")
        self.num_inputs = num_inputs
        self.method = method
        self.resample_methods = resample  # a BiFPN node keeps its projections under "resample", as effdet does
        self.activation = activation
        self.eps = eps
        self.register_parameter("edge_weights", None if method == "sum" else nn.Parameter(torch.ones(num_inputs)))

    def forward(self, inputs: Sequence[Tensor], size: tuple[int, int] | None = None) -> Tensor:
        """Fuse ``num_inputs`` tensors ``[N, C, H_i, W_i]`` to one ``[N, C, H, W]``.

        Args:
            inputs: a list or tuple of tensors of one dtype.
            size: ``(H, W)`` of the result. Default: that of the inputs with "none", or of those with "max_pool" after pooling.
        """
        return weighted_fusion(
            inputs,
            self.edge_weights,
            method=self.method,
            resample=self.resample_methods,
            size=size,
            activation=self.activation,
            eps=self.eps,
        )

    def extra_repr(self) -> str:
        """Return the options that ``repr`` shows."""
        options = (
            f"method={self.method!r}, resample={self.resample_methods}, activation={self.activation!r}, eps={self.eps}"
        )
        return f"{self.num_inputs}, {options}"
