"""Tensors from and to files: `.safetensors`, or what `torch.save` writes."""

from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Mapping
from typing import Any

import torch

from effdet_fast.models.checkpoint_names import StateDict

PathOrStateDict = str | os.PathLike[str] | Mapping[str, Any]

SAFETENSORS = ".safetensors"
_WRAPPERS = ("state_dict", "model", "model_state_dict")
_EMA_WRAPPERS = ("state_dict_ema", "model_ema", "ema")
_SHOWN = 8


def read_content(checkpoint: PathOrStateDict) -> Mapping[str, Any]:
    """All that a file (or mapping) holds, tensors on the CPU; nothing in it is executed (`weights_only=True`).

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not a checkpoint; or a `.safetensors` file, and the package safetensors is not installed.
    """
    if isinstance(checkpoint, Mapping):
        return checkpoint
    source = os.fspath(checkpoint)
    if not os.path.exists(source):
        raise FileNotFoundError(f"{source}: no such checkpoint")
    content = _read_safetensors(source) if source.endswith(SAFETENSORS) else _read_torch(source)
    if not isinstance(content, Mapping):
        raise ValueError(f"{source} holds a {type(content).__name__}, not a state dict")
    return content


def read_tensors(checkpoint: PathOrStateDict, use_ema: bool = True) -> StateDict:
    """The tensors of a file or mapping, out of their wrapper; averaged weights where it has both and `use_ema`.

    Raises:
        FileNotFoundError, ValueError: As `read_content`; ValueError too if there are no tensors.
    """
    content: Any = read_content(checkpoint)
    names = (*_EMA_WRAPPERS, *_WRAPPERS) if use_ema else _WRAPPERS
    while True:
        wrapper = next((name for name in names if isinstance(content.get(name), Mapping)), None)
        if wrapper is None:
            break
        content = content[wrapper]
    tensors = {str(key): value for key, value in content.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        keys = shorten([str(key) for key in content])
        raise ValueError(f"{describe_source(checkpoint)} holds no tensors; its keys are {keys}")
    return tensors


def write_content(content: Mapping[str, Any], path: str) -> None:
    """Writes a state dict (or, not as `.safetensors`, any plain values) that `read_content` gives back."""
    if path.endswith(SAFETENSORS):
        _safetensors().save_file(dict(content), path, metadata={"format": "pt"})
    else:
        torch.save(content, path)


def describe_source(checkpoint: PathOrStateDict) -> str:
    """What error messages call a checkpoint."""
    return "the state dict" if isinstance(checkpoint, Mapping) else str(os.fspath(checkpoint))


def shorten(items: list[str]) -> str:
    """The first few, and how many more."""
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more


def _read_torch(path: str) -> Any:
    try:
        # Training scripts around timm store their parsed arguments beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a PyTorch checkpoint: {error}") from error


def _read_safetensors(path: str) -> StateDict:
    library = _safetensors()
    try:
        return library.load_file(path)
    except Exception as error:  # the library's own error type lies in its compiled part
        raise ValueError(f"{path} cannot be read as a safetensors file: {error}") from error


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ValueError(f"{SAFETENSORS} files need `pip install safetensors`") from error
    return safetensors.torch
