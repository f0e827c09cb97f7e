"""The names of torchvision's RetinaNets, and how they map to ours, both ways.

Files from before torchvision 0.15 number the head's convolutions 0, 2, 4, 6 (with ReLUs between them) and hold the pyramid's
convolutions without a block around them.
"""

from __future__ import annotations

import re

import torch

_HEADS = {"classification_head": "class_net", "regression_head": "box_net"}
_PREDICTIONS = {"class_net": "classification_head.cls_logits", "box_net": "regression_head.bbox_reg"}
_PARTS = ("conv_rep", "norm_rep")  # of a block of the head, in torchvision's order


def our_names(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors under this package's names; keys that are none of torchvision's stay."""
    return {_our_name(key): value for key, value in state_dict.items()}


def torchvision_names(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our tensors of a RetinaNet under torchvision's new names, and in its order."""
    renamed = {_torchvision_name(key): value for key, value in state_dict.items()}
    return {key: renamed[key] for key in sorted(renamed, key=_position)}


def _our_name(key: str) -> str:
    if match := re.fullmatch(r"backbone\.body\.(.+)", key):
        return f"backbone.{match[1]}"
    if match := re.fullmatch(r"backbone\.fpn\.((?:inner|layer)_blocks\.\d+)\.(weight|bias)", key):
        return f"fpn.{match[1]}.0.{match[2]}"
    if match := re.fullmatch(r"backbone\.fpn\.(.+)", key):
        return f"fpn.{match[1]}"
    if match := re.fullmatch(r"head\.(\w+_head)\.(?:cls_logits|bbox_reg)\.(\w+)", key):
        return f"{_HEADS[match[1]]}.predict.{match[2]}"
    if match := re.fullmatch(r"head\.(\w+_head)\.conv\.(\d+)\.([01])\.(\w+)", key):
        return f"{_HEADS[match[1]]}.{_PARTS[int(match[3])]}.{match[2]}.{match[4]}"
    if match := re.fullmatch(r"head\.(\w+_head)\.conv\.(\d+)\.(weight|bias)", key):
        return f"{_HEADS[match[1]]}.conv_rep.{int(match[2]) // 2}.{match[3]}"
    return key


def _torchvision_name(key: str) -> str:
    part, _, rest = key.partition(".")
    if part == "backbone":
        return f"backbone.body.{rest}"
    if part == "fpn":
        return f"backbone.fpn.{rest}"
    kind, _, rest = rest.partition(".")
    if kind == "predict":
        return f"head.{_PREDICTIONS[part]}.{rest}"
    head = _PREDICTIONS[part].partition(".")[0]
    repeat, _, tensor = rest.partition(".")
    return f"head.{head}.conv.{repeat}.{_PARTS.index(kind)}.{tensor}"


def _position(key: str) -> tuple[int, int]:
    """Of a head's convolutions, by their number; all else stays where it is between them."""
    match = re.match(r"head\.(\w+)\.(?:conv\.(\d+))?", key)
    if match is None:
        return -1, 0
    return list(_HEADS).index(match[1]), int(match[2]) if match[2] else 1000
