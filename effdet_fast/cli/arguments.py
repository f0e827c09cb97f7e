"""Flags that more than one command has."""

from __future__ import annotations

import argparse
import json
from typing import Any

from effdet_fast.device import AMP_MODES
from effdet_fast.training.config import default_workers


def add_inference_arguments(parser: argparse.ArgumentParser, *, batch_size: int) -> None:
    """The flags of `eval` and `predict` alike."""
    parser.add_argument("--checkpoint", metavar="FILE", required=True, help="best.pt or last.pt of a run")
    parser.add_argument(
        "--batch-size", type=int, default=batch_size, metavar="N", help=f"images per step (default: {batch_size})"
    )
    add_image_size(parser)
    add_iou_threshold(parser)
    parser.add_argument("--max-detections", type=int, default=100, metavar="N", help="boxes per image (default: 100)")
    workers = default_workers()
    parser.add_argument(
        "--workers", type=int, default=workers, metavar="N", help=f"image-reading workers (default: {workers})"
    )
    parser.add_argument("--device", metavar="DEV", help="cpu, cuda or cuda:1 (default: the GPU if there is one)")
    parser.add_argument("--amp", choices=AMP_MODES, default="none", help="mixed precision (default: none)")
    parser.add_argument("--overwrite", action="store_true", help="replace existing output")
    parser.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, default=True, help="progress bar (default: yes)"
    )


def add_image_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image-size",
        type=int,
        nargs="+",
        metavar="PX",
        help="one side, or height and width, of the model's input in pixels (default: as trained)",
    )


def add_iou_threshold(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--iou-threshold", type=float, metavar="T", help="NMS drops boxes above this IoU (default: the model's own)"
    )


def image_size(sides: list[int] | None) -> int | tuple[int, ...] | None:
    """What `--image-size` said, in the form the Python functions take."""
    if sides is None:
        return None
    if len(sides) > 2:
        raise ValueError(f"--image-size takes one side, or height and width, got {len(sides)} numbers")
    return sides[0] if len(sides) == 1 else tuple(sides)


def add_model_option(parser: argparse._ActionsContainer, what: str) -> None:
    parser.add_argument(
        "--model-option", dest="model_options", action="append", metavar="FIELD=VALUE", help=f"{what}; repeatable"
    )


def model_options(entries: list[str]) -> dict[str, Any]:
    """What `--model-option` said, as keyword arguments of `create_model`. Values are JSON, or else text."""
    options = {}
    for entry in entries:
        name, equals, text = entry.partition("=")
        if not (name and equals):
            raise ValueError(f"--model-option takes FIELD=VALUE, got {entry!r}")
        try:
            options[name.replace("-", "_")] = json.loads(text)
        except ValueError:
            options[name.replace("-", "_")] = text
    return options
