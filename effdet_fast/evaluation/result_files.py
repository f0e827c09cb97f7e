"""Writing results without losing what is already there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from typing import Any


def refuse_existing(paths: Iterable[str], overwrite: bool) -> None:
    """FileExistsError naming the first of `paths` that exists, unless `overwrite`; a folder in the way always is one."""
    for path in paths:
        if os.path.isdir(path):
            raise FileExistsError(f"{path}: is a folder, a file is to be written there")
        if not overwrite and os.path.lexists(path):
            raise FileExistsError(f"{path}: exists; pass overwrite to replace it, or choose another output")


def write_atomically(path: str, write: Callable[[str], Any]) -> None:
    """Calls `write` with a temporary name beside `path` (same suffix), which then takes its place as a whole."""
    folder, name = os.path.split(path)
    os.makedirs(folder or ".", exist_ok=True)
    temporary = os.path.join(folder, f".{os.getpid()}.{name}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def write_json(path: str, content: Any) -> None:
    """Writes strict JSON (no NaN)."""

    def write(temporary: str) -> None:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(content, file, allow_nan=False)

    write_atomically(path, write)
