"""Other projects' names for our weights."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import nn

StateDict = dict[str, torch.Tensor]

# What training wrappers store beside the model's own tensors.
_NOT_WEIGHTS = ("anchors.boxes",)
# The classifier half of a timm EfficientNet; `bn2` is only top level there.
_CLASSIFIER = ("conv_head.", "bn2.", "classifier.")
_LEVEL_FIRST = re.compile(
    r"^((?:class|box)_net\.bn_rep)\.(\d+)\.(\d+)\.(weight|bias|running_mean|running_var|num_\w+)$"
)
_BLOCK = re.compile(r"^_blocks\.(\d+)\.(_\w+)\.(.+)$")
_STEM = {"_conv_stem": "conv_stem", "_bn0": "bn1"}
_EXPANDED_PARTS = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_se_reduce": "se.conv_reduce",
    "_se_expand": "se.conv_expand",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_PLAIN_PARTS = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_se_reduce": "se.conv_reduce",
    "_se_expand": "se.conv_expand",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}


def strip_prefixes(state_dict: StateDict) -> StateDict:
    """Removes "module." and "model." as long as every key has one of them, and what a wrapper adds of its own."""
    while True:
        for prefix in ("module.", "model."):
            if any(key.startswith(prefix) for key in state_dict):
                inner = {key: value for key, value in state_dict.items() if not key.endswith(_NOT_WEIGHTS)}
                if all(key.startswith(prefix) for key in inner):
                    state_dict = {key.removeprefix(prefix): value for key, value in inner.items()}
                    break
        else:
            return state_dict


def detector_state_dict(state_dict: StateDict) -> StateDict:
    """A detector's state dict under this package's (and effdet's usual) keys."""
    return {_repeat_first(key): value for key, value in strip_prefixes(state_dict).items()}


def backbone_state_dict(state_dict: StateDict, backbone: nn.Module) -> StateDict:
    """The backbone's part of a classifier's or a detector's state dict, under `EfficientNet`'s keys."""
    state_dict = strip_prefixes(state_dict)
    inner = {key.removeprefix("backbone."): value for key, value in state_dict.items() if key.startswith("backbone.")}
    if inner:
        return inner
    if any(_BLOCK.match(key) for key in state_dict):
        return _rename(state_dict, _underscored_names(backbone))
    return {key: value for key, value in state_dict.items() if not key.startswith(_CLASSIFIER)}


def _repeat_first(key: str) -> str:
    """`bn_rep.LEVEL.REPEAT.weight` as `bn_rep.REPEAT.LEVEL.bn.weight`; other keys as they are."""
    match = _LEVEL_FIRST.match(key)
    if match is None:
        return key
    prefix, level, repeat, tensor = match.groups()
    return f"{prefix}.{repeat}.{level}.bn.{tensor}"


def _rename(state_dict: StateDict, rename: Callable[[str], str | None]) -> StateDict:
    renamed = {}
    for key, value in state_dict.items():
        name = rename(key)
        if name is not None:
            renamed[name] = value
    return renamed


def _underscored_names(backbone: nn.Module) -> Callable[[str], str | None]:
    """Translates `_conv_stem`, `_bn0` and `_blocks.N._part`, where N counts through all stages; None for the rest."""
    blocks = [
        (f"blocks.{stage_name}.{block_name}", hasattr(block, "conv_pwl"))
        for stage_name, stage in backbone.get_submodule("blocks").named_children()
        for block_name, block in stage.named_children()
    ]

    def rename(key: str) -> str | None:
        match = _BLOCK.match(key)
        if match is None:
            part, _, tensor = key.partition(".")
            if part in _STEM:
                return f"{_STEM[part]}.{tensor}"
            return None if part in ("_conv_head", "_bn1", "_fc") else key
        index, part, tensor = int(match[1]), match[2], match[3]
        if index >= len(blocks):
            return key
        name, expanded = blocks[index]
        parts = _EXPANDED_PARTS if expanded else _PLAIN_PARTS
        return f"{name}.{parts[part]}.{tensor}" if part in parts else key

    return rename
