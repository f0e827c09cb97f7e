"""The EfficientNet naming with `_blocks.N._depthwise_conv`, which counts blocks through all stages."""

from __future__ import annotations

import re

import torch

_BLOCK = re.compile(r"^_blocks\.(\d+)\.(_\w+)\.(.+)$")
_TOP = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
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


def timm_names(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors under timm's names, `blocks.STAGE.BLOCK.part`; keys that are none of these stay.

    A stage begins where the number of output channels changes.
    """
    # Some implementations hold the convolution inside of a module that pads.
    state_dict = {key.replace(".conv.", "."): value for key, value in state_dict.items()}
    blocks = _stages(state_dict)
    return {_timm_name(key, blocks): value for key, value in state_dict.items()}


def _stages(state_dict: dict[str, torch.Tensor]) -> dict[int, tuple[str, dict[str, str]]]:
    """timm's name of each block, and of its parts."""
    channels = {
        int(match[1]): value.shape[0]
        for key, value in state_dict.items()
        if (match := _BLOCK.match(key)) and match[2] == "_project_conv"
    }
    blocks: dict[int, tuple[str, dict[str, str]]] = {}
    stage, position, previous = -1, 0, None
    for index in sorted(channels):
        if channels[index] != previous:
            stage, position, previous = stage + 1, 0, channels[index]
        parts = _EXPANDED_PARTS if f"_blocks.{index}._expand_conv.weight" in state_dict else _PLAIN_PARTS
        blocks[index] = f"blocks.{stage}.{position}", parts
        position += 1
    return blocks


def _timm_name(key: str, blocks: dict[int, tuple[str, dict[str, str]]]) -> str:
    match = _BLOCK.match(key)
    if match is None:
        part, _, tensor = key.partition(".")
        return f"{_TOP[part]}.{tensor}" if part in _TOP else key
    if int(match[1]) not in blocks:
        return key
    block, parts = blocks[int(match[1])]
    return f"{block}.{parts[match[2]]}.{match[3]}" if match[2] in parts else key
