"""`effdet-fast summary`."""

from __future__ import annotations

import argparse
import ast
from typing import Any

from effdet_fast.cli.arguments import image_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="efficientdet_d0, efficientdet_lite0, ...")
    parser.add_argument("--num-classes", type=int, metavar="N", help="object classes (default: as released)")
    parser.add_argument(
        "--image-size",
        type=int,
        nargs="+",
        metavar="PX",
        help="one side, or height and width, of the model's input in pixels (default: as released)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="another field of the model's configuration, for instance fusion=sum (repeatable)",
    )


def run(options: argparse.Namespace) -> int:
    import torch

    from effdet_fast.models import create_model, summary

    settings = dict(_setting(text) for text in options.set)
    if options.num_classes is not None:
        settings["num_classes"] = options.num_classes
    with torch.device("meta"):
        model = create_model(options.model, image_size=image_size(options.image_size), **settings)  # type: ignore[arg-type]
    print(summary(model))
    return 0


def _setting(text: str) -> tuple[str, Any]:
    """`fusion=sum` as ("fusion", "sum"), `fpn_cells=4` as ("fpn_cells", 4)."""
    field, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set takes FIELD=VALUE, got {text!r}")
    try:
        return field, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return field, value
