"""effdet's heads: convolutions shared by all levels, each with a BatchNorm of every level."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from effdet_fast.acceleration.chains import NormBeforeActivation, leaves_of, operations
from effdet_fast.acceleration.swap import Swap


class NormsOfHead(Swap):
    """`HeadNet`: BatchNorm and activation in one op, which keeps nothing but its input."""

    classes = ("effdet.HeadNet",)
    family, replacement = "batch_norm_act", "batch_norm_act"
    num_levels: int
    bn_level_first: bool
    conv_rep: nn.ModuleList
    bn_rep: Any
    act: nn.Module
    predict: nn.Module

    @classmethod
    def reason_against(cls, obj: Any) -> str | None:
        first = [obj.bn_rep[0][0], obj.act]
        if all(kind is None for kind, _ in operations(leaves_of(first), (NormBeforeActivation,))):
            return f"{type(leaves_of(first)[0]).__name__} and {type(obj.act).__name__}"
        return None

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        outputs = []
        for level in range(self.num_levels):
            y = x[level]
            for repeat, conv in enumerate(self.conv_rep):
                norm = self.bn_rep[level][repeat] if self.bn_level_first else self.bn_rep[repeat][level]
                for _, operation in operations(leaves_of([conv, norm, self.act]), (NormBeforeActivation,)):
                    y = operation(y)
            outputs.append(self.predict(y))
        return outputs
