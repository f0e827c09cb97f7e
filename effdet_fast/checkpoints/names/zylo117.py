"""The names of zylo117's Yet-Another-EfficientDet-Pytorch, and how they map to ours.

Its BiFPN names nodes by level and direction: `conv6_up` and its weights `p6_w1` are the top-down node of level 6,
`conv6_down` and `p6_w2` the bottom-up one. Its heads keep their BatchNorms level first.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

from effdet_fast.checkpoints.names.efficientnet import timm_names

BACKBONE = "backbone_net.model."
_HEADS = {"regressor": "box_net", "classifier": "class_net"}
_CONVS = {"depthwise_conv": "conv_dw", "pointwise_conv": "conv_pw"}
_PROJECTION_PARTS = {"0.conv": "conv", "1": "bn"}
# D6 and larger have this many BiFPN cells. Their files hold weights of the fusion that the models never read.
_UNWEIGHTED_CELLS = 8


def our_names(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors under this package's names; keys that are none of zylo117's stay."""
    inner = {key.removeprefix(BACKBONE): value for key, value in state_dict.items() if key.startswith(BACKBONE)}
    renamed = {f"backbone.{key}": value for key, value in timm_names(inner).items()}
    names = _Names(list(state_dict))
    for key, value in state_dict.items():
        if key.startswith(BACKBONE):
            continue
        name = names.translate(key)
        if name is not None:
            renamed[name] = value
    return renamed


class _Names:
    """Translates neck and heads of one file."""

    def __init__(self, keys: list[str]) -> None:
        tops = [int(match[1]) for key in keys if (match := re.match(r"bifpn\.\d+\.conv(\d)_down\.", key))]
        cells = {match[1] for key in keys if (match := re.match(r"bifpn\.(\d+)\.", key))}
        self.top_level = max(tops, default=7)
        self.weighted = len(cells) < _UNWEIGHTED_CELLS
        self.rules: list[tuple[re.Pattern[str], Callable[[re.Match[str]], str | None]]] = [
            (re.compile(r"bifpn\.(\d+)\.conv(\d)_(up|down)\.(\w+)\.conv\.(\w+)"), self._node_conv),
            (re.compile(r"bifpn\.(\d+)\.conv(\d)_(up|down)\.bn\.(\w+)"), self._node_norm),
            (re.compile(r"bifpn\.(\d+)\.p(\d)_w([12])"), self._edge_weights),
            (re.compile(r"bifpn\.0\.p(\d)_down_channel(_2)?\.(0\.conv|1)\.(\w+)"), self._lateral),
            (re.compile(r"bifpn\.0\.p5_to_p6\.(0\.conv|1)\.(\w+)"), self._level_6),
            (re.compile(r"(regressor|classifier)\.conv_list\.(\d+)\.(\w+)\.conv\.(\w+)"), self._head_conv),
            (re.compile(r"(regressor|classifier)\.bn_list\.(\d+)\.(\d+)\.(\w+)"), self._head_norm),
            (re.compile(r"(regressor|classifier)\.header\.(\w+)\.conv\.(\w+)"), self._prediction),
        ]

    def translate(self, key: str) -> str | None:
        """Our name; the key itself if it is none of zylo117's; None for a tensor that means nothing."""
        for pattern, rule in self.rules:
            if match := pattern.fullmatch(key):
                return rule(match)
        return key

    def _node(self, cell: str, level: str, down: bool) -> str:
        """Nodes count from the coarsest top-down one to P3, then from P4's bottom-up one to the top level's."""
        index = self.top_level - 3 + int(level) - 4 if down else self.top_level - 1 - int(level)
        return f"fpn.cell.{cell}.fnode.{index}"

    def _node_conv(self, match: re.Match[str]) -> str:
        cell, level, direction, conv, tensor = match.groups()
        return f"{self._node(cell, level, direction == 'down')}.after_combine.conv.{_CONVS[conv]}.{tensor}"

    def _node_norm(self, match: re.Match[str]) -> str:
        cell, level, direction, tensor = match.groups()
        return f"{self._node(cell, level, direction == 'down')}.after_combine.conv.bn.{tensor}"

    def _edge_weights(self, match: re.Match[str]) -> str | None:
        cell, level, which = match.groups()
        return f"{self._node(cell, level, which == '2')}.combine.edge_weights" if self.weighted else None

    def _lateral(self, match: re.Match[str]) -> str:
        level, second, part, tensor = match.groups()
        node = self._node("0", level, second is not None)
        return f"{node}.combine.resample.{int(level) - 3}.conv.{_PROJECTION_PARTS[part]}.{tensor}"

    def _level_6(self, match: re.Match[str]) -> str:
        return f"fpn.resample.3.conv.{_PROJECTION_PARTS[match[1]]}.{match[2]}"

    def _head_conv(self, match: re.Match[str]) -> str:
        head, repeat, conv, tensor = match.groups()
        return f"{_HEADS[head]}.conv_rep.{repeat}.{_CONVS[conv]}.{tensor}"

    def _head_norm(self, match: re.Match[str]) -> str:
        head, level, repeat, tensor = match.groups()
        return f"{_HEADS[head]}.bn_rep.{repeat}.{level}.bn.{tensor}"

    def _prediction(self, match: re.Match[str]) -> str:
        head, conv, tensor = match.groups()
        return f"{_HEADS[head]}.predict.{_CONVS[conv]}.{tensor}"
