"""Loading weights from local files: all of them fit, or none is loaded."""

from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from effdet_fast.models.checkpoint_names import backbone_state_dict, detector_state_dict

PathOrStateDict = str | os.PathLike[str] | Mapping[str, Any]

# The only tensors whose shape depends on the number of classes, of separable and of plain heads.
CLASS_LAYER = tuple(f"class_net.predict.{key}" for key in ("conv_pw.weight", "conv_pw.bias", "weight", "bias"))
_WRAPPERS = ("state_dict", "model", "model_state_dict")
_EMA_WRAPPERS = ("state_dict_ema", "model_ema", "ema")
_SHOWN = 8


class Mismatch(NamedTuple):
    """What does not fit: keys the file lacks, keys the model lacks, and (key, shape in the file, in the model)."""

    missing: list[str]
    unexpected: list[str]
    shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes)

    def describe(self) -> str:
        """One readable paragraph; long lists are cut and counted."""
        parts = []
        if self.missing:
            parts.append(f"{len(self.missing)} missing: {_shorten(self.missing)}")
        if self.unexpected:
            parts.append(f"{len(self.unexpected)} unexpected: {_shorten(self.unexpected)}")
        if self.shapes:
            rows = [f"{key} is {list(found)}, the model has {list(wanted)}" for key, found, wanted in self.shapes]
            parts.append(f"{len(rows)} of another shape: {_shorten(rows)}")
        return "; ".join(parts)


def load_checkpoint(
    model: nn.Module,
    checkpoint: PathOrStateDict,
    strict: bool = True,
    *,
    reset_head: bool = False,
    use_ema: bool = True,
) -> Mismatch:
    """Loads a whole detector's weights: this package's files, and effdet's `tf_efficientdet_*`.

    Files that wrap the weights (under "state_dict", "state_dict_ema" or "model") and keys with a "module." or "model."
    prefix are understood, as are head BatchNorms stored level first.

    Args:
        model: A `DetectionModel`.
        checkpoint: Local path, or a state dict (wrapped or not).
        strict: Raise if anything does not fit, and load nothing. Otherwise load what fits.
        reset_head: Leave out the class prediction layer and keep the model's own, for fine-tuning to other classes.
        use_ema: Prefer averaged weights where a file has both.

    Returns:
        What did not fit; empty if strict. Keys left out by `reset_head` are not counted.

    Raises:
        ValueError: Not a checkpoint, or (strict) it does not fit; every reason is in the one message.
        FileNotFoundError: No such file.
    """
    source = _describe(checkpoint)
    state_dict = detector_state_dict(_read(checkpoint, use_ema))
    ignored: tuple[str, ...] = ()
    if reset_head:
        ignored = CLASS_LAYER
        state_dict = {key: value for key, value in state_dict.items() if key not in CLASS_LAYER}
    return _load(model, state_dict, f"load_checkpoint: {source}", strict, ignored)


def load_backbone_checkpoint(model: nn.Module, checkpoint: PathOrStateDict, strict: bool = True) -> Mismatch:
    """Loads ImageNet weights into a detector's backbone.

    Understood are timm's `tf_efficientnet_*` (whole or features only), the EfficientNet naming with
    `_blocks.0._depthwise_conv.weight`, and the backbone of a detector's checkpoint. Classifier and head convolution are
    left out.

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
    state_dict = backbone_state_dict(_read(checkpoint, use_ema=True), backbone)
    return _load(backbone, state_dict, f"load_backbone_checkpoint: {_describe(checkpoint)}", strict)


def _read(checkpoint: PathOrStateDict, use_ema: bool) -> dict[str, torch.Tensor]:
    """The tensors of a file or mapping, out of their wrapper."""
    source = _describe(checkpoint)
    content: Any = checkpoint
    if not isinstance(checkpoint, Mapping):
        try:
            # Training scripts around timm store their parsed arguments beside the weights.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(checkpoint, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise
        except (pickle.UnpicklingError, EOFError, RuntimeError, OSError) as error:
            raise ValueError(f"{source} cannot be read as a PyTorch checkpoint: {error}") from error
    names = (*_EMA_WRAPPERS, *_WRAPPERS) if use_ema else _WRAPPERS
    while isinstance(content, Mapping):
        wrapper = next((name for name in names if isinstance(content.get(name), Mapping)), None)
        if wrapper is None:
            break
        content = content[wrapper]
    if not isinstance(content, Mapping):
        raise ValueError(f"{source} holds a {type(content).__name__}, not a state dict")
    tensors = {str(key): value for key, value in content.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise ValueError(f"{source} holds no tensors; its keys are {_shorten([str(key) for key in content])}")
    return tensors


def _load(
    module: nn.Module, state_dict: dict[str, torch.Tensor], what: str, strict: bool, ignored: tuple[str, ...] = ()
) -> Mismatch:
    own = module.state_dict()
    mismatch = Mismatch(
        # Older files lack these counters, which nothing in a forward pass reads.
        missing=[
            key
            for key in own
            if key not in state_dict and key not in ignored and not key.endswith("num_batches_tracked")
        ],
        unexpected=[key for key in state_dict if key not in own],
        shapes=[
            (key, tuple(value.shape), tuple(own[key].shape))
            for key, value in state_dict.items()
            if key in own and value.shape != own[key].shape
        ],
    )
    if mismatch and strict:
        hint = ""
        if any(key in CLASS_LAYER for key, _, _ in mismatch.shapes):
            hint = (
                ". The class layer has another number of classes; load_checkpoint(..., reset_head=True) keeps the "
                "model's own"
            )
        raise ValueError(f"{what} does not fit, nothing was loaded. {mismatch.describe()}{hint}")
    skipped = {*mismatch.unexpected, *(key for key, _, _ in mismatch.shapes)}
    with torch.no_grad():
        for key, value in state_dict.items():
            if key not in skipped:
                own[key].copy_(value)
    return mismatch


def _describe(checkpoint: PathOrStateDict) -> str:
    return "the state dict" if isinstance(checkpoint, Mapping) else str(os.fspath(checkpoint))


def _shorten(items: list[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more
