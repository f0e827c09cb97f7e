"""Writes files without losing what is already there."""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from collections.abc import Callable, Iterable
from typing import Any


def refuse_existing(paths: Iterable[str], overwrite: bool) -> None:
    """FileExistsError naming the first of `paths` that exists, unless `overwrite`; a folder in the way always is one."""
    for path in paths:
        if os.path.isdir(path):
            raise FileExistsError(f"{path}: is a folder, a file is to be written there")
        if not overwrite and os.path.lexists(path):
            raise FileExistsError(f"{path}: exists; pass overwrite to replace it, or choose another output")


def check_writable(path: str) -> None:
    """Before the work that `path` is for: OSError naming its folder, made if missing, unless files can be written there."""
    folder = os.path.dirname(path) or "."
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{folder}: cannot be written to: {error.strerror}") from error


def refuse_links(paths: Iterable[str], output: str) -> None:
    """ValueError naming the first folder between `output` and one of `paths` below it that is a link: it may lead anywhere."""
    for folder in sorted({os.path.dirname(path) for path in paths}):
        while len(folder) > len(output):
            if os.path.islink(folder):
                raise ValueError(f"{folder}: is a link inside the output folder, which is not followed; remove it")
            folder = os.path.dirname(folder)


def write_atomically(path: str, write: Callable[[str], Any], *, durable: bool = False) -> None:
    """Calls `write` with the name of a new file beside `path` (same suffix), which then takes its place as a whole.

    The name is random and the file new, so that nobody can have put a link there; a link at `path` is replaced, not followed.
    If `durable`, the new file is on the disk when this returns, so that it survives a power cut.
    """
    folder, name = os.path.split(path)
    os.makedirs(folder or ".", exist_ok=True)
    temporary = os.path.join(folder, f".{secrets.token_hex(8)}.{name[-48:]}")  # a long one would be too long
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666))
    try:
        write(temporary)
        if durable:
            _synchronize(temporary, os.O_RDWR)
        os.replace(temporary, path)
        if durable and hasattr(os, "O_DIRECTORY"):  # the new name itself
            _synchronize(folder or ".", os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise OSError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _synchronize(path: str, flags: int) -> None:
    opened = os.open(path, flags)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_json(path: str, content: Any, indent: int | None = None) -> None:
    """Writes strict JSON (no NaN)."""

    def write(temporary: str) -> None:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(content, file, allow_nan=False, indent=indent)
            file.write("\n" if indent else "")

    write_atomically(path, write)
