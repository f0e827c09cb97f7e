"""What users type or keep in files, as lines of text: functions and their arguments, flags, names of weights.

`python -m tests.public_names` writes public_names.txt anew; read its diff before you commit it.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import torch

from effdet_fast.cli import main
from effdet_fast.models import create_model, list_models

FILE = Path(__file__).with_suffix(".txt")
PACKAGES = ("", "acceleration", "data", "evaluation", "export", "models", "nn", "ops", "training")


def lines() -> list[str]:
    return [*_names(), *sorted(_flags()), *_weights()]


def _names() -> Iterator[str]:
    seen = []  # what the package itself offers is in one of its parts too
    for package in PACKAGES:
        module = importlib.import_module(f"effdet_fast.{package}".rstrip("."))
        for name in sorted(module.__all__):
            value = getattr(module, name)
            path = f"{module.__name__}.{name}"
            if any(value is other for other in seen) or not callable(value):
                yield path
                continue
            seen.append(value)
            yield f"{path}{_arguments(value)}"
            if inspect.isclass(value):
                yield from _members(path, value)


def _members(path: str, cls: type) -> Iterator[str]:
    for name, value in sorted(vars(cls).items()):
        function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        if name.startswith("_") or not isinstance(function, (FunctionType, property)):
            continue
        yield f"{path}.{name}{_arguments(function) if inspect.isfunction(function) else ''}"


def _arguments(function: Any) -> str:
    try:
        signature = inspect.signature(function)
    except ValueError:
        return ""
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))


def _flags() -> Iterator[str]:
    for command in main.COMMANDS:
        parser = main._parser(command)
        (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        for action in commands.choices[command]._actions:
            # The default depends on the machine.
            default = "..." if action.dest == "workers" else repr(action.default).replace(argparse.SUPPRESS, "none")
            choices = "" if action.choices is None else f" of {list(action.choices)}"
            flags = " ".join(action.option_strings) or action.dest
            yield f"effdet-fast {command} {flags}: {action.nargs or 1}{choices}, default {default}"


def _weights() -> Iterator[str]:
    for name in list_models():
        with torch.device("meta"):
            state = create_model(name).state_dict()
        keys = "".join(f"{key} {tuple(value.shape)} {value.dtype}\n" for key, value in state.items())
        yield f"{name}: {len(state)} tensors, names and shapes crc32 {zlib.crc32(keys.encode()):08x}"


if __name__ == "__main__":
    FILE.write_text("".join(f"{line}\n" for line in lines()))
