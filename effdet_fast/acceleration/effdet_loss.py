"""effdet's detection loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from effdet_fast.acceleration.swap import Swap
from effdet_fast.ops.detection_loss import detection_loss


class DetectionLoss(Swap):
    """`DetectionLoss`, also where its configuration asks for TorchScript: all levels and both losses in one op."""

    classes = ("effdet.DetectionLoss",)
    family, replacement = "detection_loss", "detection_loss"
    num_classes: int
    alpha: float
    gamma: float
    delta: float
    box_loss_weight: float
    label_smoothing: float
    legacy_focal: bool

    @classmethod
    def reason_against(cls, obj: Any) -> str | None:
        if obj.legacy_focal:
            return "legacy_focal"
        ranges = {"alpha": (0, 1), "label_smoothing": (0, 1), "gamma": (0, None), "box_loss_weight": (0, None)}
        for name, (low, high) in ranges.items():
            value = getattr(obj, name)
            if value < low or (high is not None and value > high):
                return f"{name} {value}"
        return None if obj.delta > 0 else f"delta {obj.delta}"

    def forward(
        self,
        cls_outputs: Sequence[Tensor],
        box_outputs: Sequence[Tensor],
        cls_targets: Sequence[Tensor],
        box_targets: Sequence[Tensor],
        num_positives: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if DetectionLoss.reason_against(self):
            return super().forward(cls_outputs, box_outputs, cls_targets, box_targets, num_positives)  # type: ignore[misc]
        total, cls, box = detection_loss(
            cls_outputs,
            box_outputs,
            cls_targets,
            box_targets,
            num_positives.sum(),  # of any shape in effdet
            num_classes=self.num_classes,
            alpha=self.alpha,
            gamma=self.gamma,
            delta=self.delta,
            box_loss_weight=self.box_loss_weight,
            label_smoothing=self.label_smoothing,
        )
        return total.float(), cls.float(), box.float()
