"""Recognizes which project wrote a state dict, and renames its keys to ours.

Our names are effdet's for an EfficientDet, timm's for an EfficientNet, and torchvision's for a ResNet.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from effdet_fast.checkpoints.names import effdet, efficientnet, torchvision, zylo117

StateDict = dict[str, torch.Tensor]

# Of DataParallel and DistributedDataParallel, of modules that hold a model, and of torch.compile.
_PREFIXES = ("module.", "model.", "_orig_mod.")
# What training wrappers store beside the model's own tensors.
_NOT_WEIGHTS = ("anchors.boxes",)
# The classifier half of a timm EfficientNet (`bn2` is only top level there), and of a ResNet.
CLASSIFIER = ("conv_head.", "bn2.", "classifier.", "fc.")


class Naming(NamedTuple):
    """One project's names.

    Attributes:
        name: What messages call it.
        sign: Regex for the start of a key. `NAMINGS` are tried in order, and no later one's files may have such a key.
        our_names: Renames its tensors. Keys it does not know stay as they are.
        is_detector: Whether files hold whole detectors, or backbones.
    """

    name: str
    sign: str
    our_names: Callable[[StateDict], StateDict]
    is_detector: bool


def strip_prefixes(state_dict: StateDict) -> StateDict:
    """Removes the prefixes of wrappers as long as every key has one of them, and what a wrapper adds of its own."""
    while True:
        for prefix in _PREFIXES:
            if any(key.startswith(prefix) for key in state_dict):
                inner = {key: value for key, value in state_dict.items() if not key.endswith(_NOT_WEIGHTS)}
                if all(key.startswith(prefix) for key in inner):
                    state_dict = {key.removeprefix(prefix): value for key, value in inner.items()}
                    break
        else:
            return state_dict


def _same_names(state_dict: StateDict) -> StateDict:
    return dict(state_dict)


NAMINGS = (
    Naming("zylo117's EfficientDet", r"backbone_net\.model\.", zylo117.our_names, True),
    Naming("torchvision RetinaNet", r"head\.classification_head\.", torchvision.our_names, True),
    Naming("effdet, head BatchNorms level first", r"class_net\.bn_rep\.\d+\.\d+\.(?!bn\.)", effdet.repeat_first, True),
    Naming("effdet and effdet_fast EfficientDet", r"class_net\.conv_rep\.0\.conv_dw\.", _same_names, True),
    Naming("effdet_fast", r"class_net\.", _same_names, True),
    Naming("EfficientNet with _blocks", r"_blocks\.0\._", efficientnet.timm_names, False),
    Naming("timm EfficientNet", r"blocks\.0\.0\.conv_dw\.", _same_names, False),
    Naming("timm and torchvision ResNet", r"layer1\.0\.conv1\.", _same_names, False),
)


def recognize(keys: Iterable[str]) -> Naming | None:
    """The naming that a state dict's keys (without wrappers' prefixes) follow."""
    keys = list(keys)
    return next((naming for naming in NAMINGS if any(re.match(naming.sign, key) for key in keys)), None)


def with_our_names(state_dict: StateDict) -> StateDict:
    """The tensors of any known naming under ours; those of an unknown one as they are."""
    state_dict = strip_prefixes(state_dict)
    naming = recognize(state_dict)
    return state_dict if naming is None else naming.our_names(state_dict)


def backbone_of(state_dict: StateDict) -> StateDict:
    """The backbone's part of a detector's or a classifier's state dict, both under our names."""
    inner = {key.removeprefix("backbone."): value for key, value in state_dict.items() if key.startswith("backbone.")}
    return inner or {key: value for key, value in state_dict.items() if not key.startswith(CLASSIFIER)}
