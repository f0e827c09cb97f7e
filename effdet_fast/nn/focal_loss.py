"""Focal loss as a module."""

from torch import Tensor, nn

from effdet_fast.ops.focal_loss import sigmoid_focal_loss


class FocalLoss(nn.Module):
    """The sigmoid focal loss from integer labels or soft targets: `effdet_fast.ops.sigmoid_focal_loss` with fixed options.

    It has no parameters; ``class_weight`` is a buffer (Lin et al., Focal Loss for Dense Object Detection, arXiv:1708.02002).

    Args:
        alpha: weight of positives, in [0, 1]; -1 switches the weighting off.
        gamma: focusing exponent, >= 0.
        reduction: "none", "mean" over all elements, or "sum".
        label_smoothing: in [0, 1].
        class_weight: ``[C]``, floating: factor of each class's logits; None weighs all alike.
    """

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
        """Compute the loss.

        Args:
            inputs: logits ``[..., C]``.
            targets: integer labels ``[...]``, -1 for background and -2 for ignored; or floating, of the shape of ``inputs``.
            normalizer: divides a "sum".

        Returns:
            A tensor of the shape of ``inputs`` with "none", else a scalar.

        Raises:
            TypeError: as `effdet_fast.ops.sigmoid_focal_loss`.
            ValueError: as `effdet_fast.ops.sigmoid_focal_loss`, which also checks the options.
        """
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
        """Return the options that ``repr`` shows."""
        return f"alpha={self.alpha}, gamma={self.gamma}, reduction={self.reduction!r}, label_smoothing={self.label_smoothing}"
