"""How checkpoints are written and read: atomically, and as plain values that load with ``weights_only=True``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from effdet_fast.evaluation.result_files import write_atomically
from effdet_fast.evaluation.trained_model import FORMAT
from effdet_fast.models.checkpoint_files import read_torch_file

# What a run continues from, as `Trainer.save_last` writes it.
_STATE = (
    "config",
    "epoch",
    "batch",
    "step",
    "images_per_step",
    "data",
    "model",
    "optimizer",
    "scaler",
    "ema_updates",
    "sums",
    "rows",
    "best",
    "metrics",
)
_PUBLISHED = ("state_dict", "category_ids", "class_names")


def save_atomically(content: dict[str, Any], path: Path) -> None:
    """Write `content` with ``torch.save`` so that `path` always holds a whole file: the old one or the new one.

    Raises:
        OSError: It cannot be written, for instance for want of space; names the file.
    """

    def write(temporary: str) -> None:
        with open(temporary, "wb") as file:
            try:
                torch.save(content, file)
            except RuntimeError as error:  # PyTorch's writer tells of a full disk in this way
                raise OSError(str(error).partition("\n")[0]) from error
            file.flush()
            os.fsync(file.fileno())

    write_atomically(os.fspath(path), write)
    if hasattr(os, "O_DIRECTORY"):  # the rename itself survives a power cut only once the folder is synced
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load_run_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a `best.pt` or `last.pt`, tensors on the CPU.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is no checkpoint of a training run, or one of a later format.
    """
    content = read_torch_file(path)
    if not isinstance(content, dict) or "format" not in content or "state_dict" not in content:
        raise ValueError(f"{path} is not a checkpoint of a training run (it holds no format and state_dict)")
    if content["format"] > FORMAT:
        raise ValueError(f"{path} has checkpoint format {content['format']}; this version reads up to {FORMAT}")
    return content


def training_state(content: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """The part of a `last.pt` that a run continues from; ValueError for a `best.pt`, which has none, or if it is not whole."""
    if "training" not in content:
        raise ValueError(f"{path} holds weights only and cannot be resumed; resume from the run's last.pt")
    state = content["training"]
    missing = [key for key in _STATE if not isinstance(state, dict) or key not in state]
    missing += [key for key in _PUBLISHED if key not in content]
    if missing:
        raise ValueError(f"{path} cannot be resumed: it has no {', '.join(missing)}")
    return state
