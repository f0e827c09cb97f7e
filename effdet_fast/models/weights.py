"""Loading of weights from local files."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import nn

from effdet_fast.checkpoints.files import PathOrStateDict, describe_source, read_tensors, shorten
from effdet_fast.checkpoints.names import StateDict, backbone_of, with_our_names

_CLASS_LAYER = re.compile(r"class_net\.predict\.(conv_pw\.)?(weight|bias)")
_COUNTER = "num_batches_tracked"


def is_class_layer(key: str) -> bool:
    """Whether a tensor's shape depends on the number of classes."""
    return _CLASS_LAYER.fullmatch(key) is not None


class Mismatch(NamedTuple):
    """What does not fit between a checkpoint and a model; false if everything does.

    Attributes:
        missing: Keys that the checkpoint lacks.
        unexpected: Keys that the model lacks.
        shapes: Of each tensor with another shape its key, the shape in the checkpoint and the shape in the model.
    """

    missing: list[str]
    unexpected: list[str]
    shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes)

    def describe(self) -> str:
        """Describe the mismatch in one paragraph; long lists are cut and counted."""
        parts = []
        if self.missing:
            parts.append(f"{len(self.missing)} missing: {shorten(self.missing)}")
        if self.unexpected:
            parts.append(f"{len(self.unexpected)} unexpected: {shorten(self.unexpected)}")
        if self.shapes:
            rows = [f"{key} is {list(found)}, the model has {list(wanted)}" for key, found, wanted in self.shapes]
            parts.append(f"{len(rows)} of another shape: {shorten(rows)}")
        return "; ".join(parts)


def load_checkpoint(
    model: nn.Module,
    checkpoint: PathOrStateDict,
    strict: bool = True,
    *,
    reset_head: bool = False,
    use_ema: bool = True,
) -> Mismatch:
    """Load the weights of a whole detector.

    It reads this package's files, those of effdet and torchvision, and all others that `convert_checkpoint` knows: `.safetensors`
    files, files that wrap the weights (under "state_dict", "state_dict_ema" or "model"), and keys with a prefix "module.",
    "model." or "_orig_mod.". Nothing in a file is executed (`weights_only=True`).

    Args:
        model: A `DetectionModel`.
        checkpoint: Local path, or a state dict (wrapped or not).
        strict: Raise if anything does not fit, and load nothing. Otherwise load what fits.
        reset_head: Leave out the class prediction layer and keep the model's own, for fine-tuning on other classes.
        use_ema: Prefer averaged weights where a file has both.

    Returns:
        What did not fit; empty if strict. Keys left out by `reset_head` are not counted.

    Raises:
        ValueError: Not a checkpoint, or (strict) it does not fit; every reason is in the one message.
        FileNotFoundError: No such file.
    """
    source = describe_source(checkpoint)
    state_dict = with_our_names(read_tensors(checkpoint, use_ema))
    ignored: list[str] = []
    if reset_head:
        ignored = [key for key in model.state_dict() if is_class_layer(key)]
        state_dict = {key: value for key, value in state_dict.items() if not is_class_layer(key)}
    return _load(model, state_dict, f"load_checkpoint: {source}", strict, ignored)


def load_backbone_checkpoint(model: nn.Module, checkpoint: PathOrStateDict, strict: bool = True) -> Mismatch:
    """Load ImageNet weights into a detector's backbone.

    It reads timm's EfficientNets and ResNets (whole or features only), torchvision's ResNets, EfficientNets with keys like
    `_blocks.0._depthwise_conv.weight`, and the backbone of a detector's checkpoint; `.safetensors` files too. The classifier and
    the convolution before it are left out. Nothing in a file is executed (`weights_only=True`).

    Args:
        model: A `DetectionModel`.
        checkpoint: Local path, or a state dict (wrapped or not).
        strict: Raise if anything does not fit, and load nothing. Otherwise load what fits.

    Returns:
        What did not fit; empty if strict.

    Raises:
        ValueError: Not a checkpoint, or (strict) it does not fit; every reason is in the one message.
        FileNotFoundError: No such file.
    """
    backbone = model.get_submodule("backbone")
    state_dict = backbone_of(with_our_names(read_tensors(checkpoint)))
    return _load(backbone, state_dict, f"load_backbone_checkpoint: {describe_source(checkpoint)}", strict)


def compare(state_dict: StateDict, own: StateDict, ignored: Collection[str] = ()) -> Mismatch:
    """Compare a state dict with a model's own, both under our names.

    BatchNorm's counters of batches are left out: old files and frozen BatchNorms lack them, and nothing reads them.

    Args:
        state_dict: Tensors of a checkpoint.
        own: Tensors of the model.
        ignored: Keys that may be missing.
    """
    return Mismatch(
        missing=[key for key in own if key not in state_dict and key not in ignored and not key.endswith(_COUNTER)],
        unexpected=[key for key in state_dict if key not in own and not key.endswith(_COUNTER)],
        shapes=[
            (key, tuple(value.shape), tuple(own[key].shape))
            for key, value in state_dict.items()
            if key in own and value.shape != own[key].shape
        ],
    )


def _load(module: nn.Module, state_dict: StateDict, what: str, strict: bool, ignored: Collection[str] = ()) -> Mismatch:
    own = module.state_dict()
    mismatch = compare(state_dict, own, ignored)
    other_shape = [key for key, _, _ in mismatch.shapes]
    if mismatch and strict:
        hint = ""
        if any(is_class_layer(key) for key in other_shape):
            hint = (
                ". The class layer has another number of classes; load_checkpoint(..., reset_head=True) keeps the "
                "model's own"
            )
        raise ValueError(f"{what} does not fit, nothing was loaded. {mismatch.describe()}{hint}")
    with torch.no_grad():
        for key, value in state_dict.items():
            if key in own and key not in other_shape:
                own[key].copy_(value)
    return mismatch
