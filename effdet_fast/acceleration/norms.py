"""timm's BatchNorm that carries its activation."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from effdet_fast.acceleration.swap import Swap, activation_name, has_hooks
from effdet_fast.nn.batch_norm_act import normalize


class NormAct(Swap):
    """`timm.layers.BatchNormAct2d` in one op that keeps nothing but its input."""

    classes = ("timm.BatchNormAct2d",)
    family, replacement = "batch_norm_act", "batch_norm_act"
    act: nn.Module
    drop: nn.Module

    @classmethod
    def reason_against(cls, obj: Any) -> str | None:
        if type(obj.drop) is not nn.Identity:
            return "it drops between normalization and activation"
        if has_hooks(obj.act):
            return "a hook on its activation"
        if type(obj.act) is not nn.Identity and activation_name(obj.act) is None:
            return f"activation {type(obj.act).__name__}"
        return None

    def forward(self, x: Tensor) -> Tensor:
        if NormAct.reason_against(self):
            return super().forward(x)  # type: ignore[misc]
        return normalize(self, x, activation_name(self.act))  # type: ignore[arg-type]
