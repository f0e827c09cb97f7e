"""`effdet-fast train`."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from typing import Any

from effdet_fast.cli.arguments import add_model_option, image_size, model_options
from effdet_fast.training.config import TrainConfig
from effdet_fast.training.options import GROUPS, Option, help_text, options_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every flag is a field of `TrainConfig`; one that is not given is left out, so that --resume sees what is."""
    parser.argument_default = argparse.SUPPRESS
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    hints = typing.get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        option, text = field.metadata["option"], help_text(field)
        if field.name == "model_options":
            add_model_option(groups[option.group], text)
        else:
            flag = f"--{field.name.replace('_', '-')}"
            groups[option.group].add_argument(flag, help=text, **_parsing(option, hints[field.name]))


def _parsing(option: Option, annotation: Any) -> dict[str, Any]:
    """How argparse reads a value of that type."""
    if annotation is bool:
        return {"action": argparse.BooleanOptionalAction if option.negatable else "store_true"}
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)] if is_union else [annotation]
    if len(kinds) > 1:  # a number or a word
        return {"metavar": option.metavar}
    (kind,) = kinds
    if typing.get_origin(kind) is typing.Literal:
        return {"choices": typing.get_args(kind)}
    if typing.get_origin(kind) is tuple:
        count = len(option.metavar) if isinstance(option.metavar, tuple) else "+"
        return {"type": typing.get_args(kind)[0], "nargs": count, "metavar": option.metavar}
    return {"type": kind, "metavar": option.metavar}


def run(options: argparse.Namespace) -> int:
    from effdet_fast.training import train

    known = options_of(TrainConfig)
    given = {name: value for name, value in vars(options).items() if name in known}
    if "image_size" in given:
        given["image_size"] = image_size(given["image_size"])
    if given.get("depth", "auto").isdecimal():
        given["depth"] = int(given["depth"])
    if "model_options" in given:
        given["model_options"] = model_options(given["model_options"])
    result = train(**given)
    if result.signal is not None:
        if result.is_main:
            print(
                f"stopped after {result.steps} steps; to continue: effdet-fast train --resume {result.last}", flush=True
            )
        return 128 + result.signal
    if result.is_main:
        best = f", best AP {result.best_ap:.4f}" if result.best_ap is not None else ""
        print(f"finished {result.epochs} epochs{best}; weights: {result.best}", flush=True)
    return 0
