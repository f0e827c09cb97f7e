"""timm's squeeze-and-excite."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from effdet_fast.acceleration.swap import Swap, activation_name, has_hooks, is_one_of
from effdet_fast.ops.squeeze_excite import squeeze_excite


class SqueezeExcite(Swap):
    """The `SqueezeExcite` of timm's EfficientNets: means, two small products and the gating in one op."""

    classes = ("timm.SqueezeExcite",)
    family, replacement = "squeeze_excite", "squeeze_excite"
    conv_reduce: nn.Conv2d
    act1: nn.Module
    conv_expand: nn.Conv2d
    gate: nn.Module

    @classmethod
    def reason_against(cls, obj: Any) -> str | None:
        parts = [getattr(obj, name, None) for name in ("conv_reduce", "act1", "conv_expand", "gate")]
        if not all(isinstance(part, nn.Module) for part in parts):
            return "an unknown version of it"
        if any(has_hooks(part) for part in parts):  # type: ignore[arg-type]
            return "a hook on a part of it"
        reduce, activation, expand, gate = parts
        if type(reduce) is not nn.Conv2d or type(expand) is not nn.Conv2d:
            return "its convolutions were replaced"
        if activation_name(activation) is None:  # type: ignore[arg-type]
            return f"activation {type(activation).__name__}"
        if not (type(gate) is nn.Sigmoid or is_one_of(gate, "timm.Sigmoid")):
            return f"gate {type(gate).__name__}"
        return None

    def forward(self, x: Tensor) -> Tensor:
        if SqueezeExcite.reason_against(self):
            return super().forward(x)  # type: ignore[misc]
        reduce, expand = self.conv_reduce, self.conv_expand
        activation = activation_name(self.act1) or ""
        return squeeze_excite(x, reduce.weight, reduce.bias, expand.weight, expand.bias, activation=activation)
