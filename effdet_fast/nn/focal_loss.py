"""Focal loss as a module."""

from torch import Tensor, nn

from effdet_fast.ops.focal_loss import sigmoid_focal_loss


class FocalLoss(nn.Module):
    """:func:`effdet_fast.ops.sigmoid_focal_loss` with its options kept; no parameters. ``class_weight`` is a buffer."""

    class_weight: Tensor | None

    def __init__(
        self,
        alpha: float = 0.25,
        gamma: float = 2.0,
        reduction: str = "none",
        label_smoothing: float = 0.0,
        class_weight: Tensor | None = None,
    ):
        super().__init__()
        self.register_buffer("class_weight", class_weight)
        self.alpha = alpha
        self.gamma = gamma
        self.reduction = reduction
        self.label_smoothing = label_smoothing

    def forward(self, inputs: Tensor, targets: Tensor, normalizer: float | Tensor | None = None) -> Tensor:
        return sigmoid_focal_loss(
            inputs,
            targets,
            self.alpha,
            self.gamma,
            self.reduction,
            label_smoothing=self.label_smoothing,
            normalizer=normalizer,
            class_weight=self.class_weight,
        )

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, gamma={self.gamma}, reduction={self.reduction!r}, label_smoothing={self.label_smoothing}"
