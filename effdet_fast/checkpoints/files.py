"""Reads and writes checkpoint files: `.safetensors`, or what `torch.save` writes."""

from __future__ import annotations

import argparse
import os
import re
import struct
from collections.abc import Mapping
from typing import Any

import torch

from effdet_fast.checkpoints.names import StateDict
from effdet_fast.files import write_atomically

PathOrStateDict = str | os.PathLike[str] | Mapping[str, Any]

SAFETENSORS = ".safetensors"
_WRAPPERS = ("state_dict", "model", "model_state_dict")
_EMA_WRAPPERS = ("state_dict_ema", "model_ema", "ema")
_SHOWN = 8


def read_content(checkpoint: PathOrStateDict) -> Mapping[str, Any]:
    """Read a checkpoint file, tensors on the CPU; a mapping is returned as it is.

    Nothing in the file is executed (`weights_only=True`).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no checkpoint, or it is a `.safetensors` file and the package safetensors is not installed.
    """
    if isinstance(checkpoint, Mapping):
        return checkpoint
    source = os.fspath(checkpoint)
    content = _read_safetensors(source) if source.endswith(SAFETENSORS) else read_torch_file(source)
    if not isinstance(content, Mapping):
        raise ValueError(f"{source} holds a {type(content).__name__}, not a state dict")
    return content


def read_tensors(checkpoint: PathOrStateDict, use_ema: bool = True) -> StateDict:
    """Read the tensors of a file or mapping, out of their wrapper; averaged weights where it has both and `use_ema`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: As `read_content`, or there are no tensors.
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


def write_content(content: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a state dict for `read_content`; in files other than `.safetensors` also plain values.

    `path` always holds a whole file, the old one or the new one, even after a power cut.

    Raises:
        OSError: The file, which the message names, cannot be written, for instance because the disk is full.
    """
    path = os.fspath(path)
    write = _write_safetensors if path.endswith(SAFETENSORS) else _write_torch_file
    write_atomically(path, lambda temporary: write(content, temporary), durable=True)


def describe_source(checkpoint: PathOrStateDict) -> str:
    """What error messages call a checkpoint."""
    return "the state dict" if isinstance(checkpoint, Mapping) else str(os.fspath(checkpoint))


def shorten(items: list[str]) -> str:
    """Join the first few items, and say how many more there are."""
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more


def read_torch_file(path: str | os.PathLike[str]) -> Any:
    """Read what `torch.save` wrote, tensors on the CPU; nothing in the file is executed (`weights_only=True`).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: `torch.save` did not write it, it was cut short, or it holds other objects than tensors and plain values.
    """
    _require_file(path)
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # foreign bytes make the unpickler raise anything, KeyError and IndexError included
        found = _FOREIGN.search(str(error))
        why = f"torch.save did not write it, or it was cut short ({type(error).__name__})"
        if found or isinstance(error, _UnknownNumber):
            why = f"it holds a {found[1] if found else error}"
        raise ValueError(f"{path}: cannot be read as a checkpoint of tensors and plain values: {why}") from error


class _UnknownNumber(Exception):
    pass


class _NumpyType:
    """Read instead of `numpy.dtype`, so that a number of NumPy's, as training scripts store their best score, is a Python one."""

    _FORMATS = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b", "b1": "?"}
    _FORMATS |= {"u8": "Q", "u4": "I", "u2": "H", "u1": "B"}
    order = "<"

    def __init__(self, name: str, *_: Any) -> None:
        if name not in self._FORMATS:
            raise _UnknownNumber(f"value of NumPy's type {name}")
        self.format = self._FORMATS[name]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = ">" if state[1] == ">" else "<"


def _numpy_number(kind: _NumpyType, value: bytes) -> float:
    return struct.unpack(kind.order + kind.format, value)[0]


# Training scripts around timm store their parsed arguments beside the weights, effdet's its best AP.
_STAND_INS: list[Any] = [
    argparse.Namespace,
    (_NumpyType, "numpy.dtype"),
    (_numpy_number, "numpy.core.multiarray.scalar"),
    (_numpy_number, "numpy._core.multiarray.scalar"),
]
_FOREIGN = re.compile(r"GLOBAL ([\w.]+)")


def _require_file(path: str | os.PathLike[str]) -> None:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such checkpoint")


def _read_safetensors(path: str) -> StateDict:
    _require_file(path)
    library = _safetensors()
    try:
        return library.load_file(path)
    except Exception as error:  # the library's own error type lies in its compiled part
        raise ValueError(f"{path} cannot be read as a safetensors file: {error}") from error


def _write_safetensors(content: Mapping[str, Any], path: str) -> None:
    _safetensors().save_file(dict(content), path, metadata={"format": "pt"})


def _write_torch_file(content: Mapping[str, Any], path: str) -> None:
    with open(path, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # PyTorch's writer tells of a full disk in this way
            raise OSError(str(error).partition("\n")[0]) from error


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ValueError(f"{SAFETENSORS} files need `pip install safetensors`") from error
    return safetensors.torch
