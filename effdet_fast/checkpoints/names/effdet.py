"""effdet's names. They are ours for an EfficientDet, except in files of models with `head_bn_level_first`."""

from __future__ import annotations

import re

import torch

_LEVEL_FIRST = re.compile(
    r"^((?:class|box)_net\.bn_rep)\.(\d+)\.(\d+)\.(weight|bias|running_mean|running_var|num_\w+)$"
)


def repeat_first(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`bn_rep.LEVEL.REPEAT.weight` as `bn_rep.REPEAT.LEVEL.bn.weight`; other keys stay."""
    return {_LEVEL_FIRST.sub(r"\1.\3.\2.bn.\4", key): value for key, value in state_dict.items()}
