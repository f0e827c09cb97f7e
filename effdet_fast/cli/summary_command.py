"""`effdet-fast summary`."""

from __future__ import annotations

import argparse

from effdet_fast.cli.arguments import add_model_option, image_size, model_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="efficientdet_d0, retinanet_resnet50_fpn, ...")
    parser.add_argument("--num-classes", type=int, metavar="N", help="object classes (default: as released)")
    parser.add_argument(
        "--image-size",
        type=int,
        nargs="+",
        metavar="PX",
        help="one side, or height and width, of the model's input in pixels (default: as released)",
    )
    add_model_option(parser, "another value for a field of the model's configuration (neck=panet, fusion=softmax, ...)")


def run(options: argparse.Namespace) -> int:
    import torch

    from effdet_fast.models import create_model, summary

    settings = model_options(options.model_options or [])
    if options.num_classes is not None:
        settings["num_classes"] = options.num_classes
    with torch.device("meta"):
        model = create_model(options.model, image_size=image_size(options.image_size), **settings)  # type: ignore[arg-type]
    print(summary(model))
    return 0
