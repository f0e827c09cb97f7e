"""`effdet-fast convert`."""

from __future__ import annotations

import argparse

# As `effdet_fast.checkpoints.convert.TARGETS`, which --help need not import torch for.
TARGETS = ("effdet", "torchvision", "timm", "effdet_fast")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", help="checkpoint to read, .pt, .pth or .safetensors")
    parser.add_argument("output", metavar="OUT", help="checkpoint to write, .pt, .pth or .safetensors")
    parser.add_argument(
        "--to", choices=TARGETS, required=True, help="whose names OUT has; timm takes the backbone alone"
    )
    parser.add_argument(
        "--model", metavar="NAME", help="model of the weights (default: what IN says, or the one they fit)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing output")


def run(options: argparse.Namespace) -> int:
    from effdet_fast import convert_checkpoint

    done = convert_checkpoint(
        options.source, options.output, options.to, model=options.model, overwrite=options.overwrite
    )
    classes = "" if done.num_classes is None else f", {done.num_classes} classes"
    print(f"{done.naming} -> {options.to}: {done.names[0]}{classes}, {done.tensors} tensors in {options.output}")
    if len(done.names) > 1:
        print(f"the same weights fit {', '.join(done.names[1:])}; --model says which is meant")
    if done.left_out:
        print(
            f"left out: {len(done.left_out)} tensors that {options.to} has no place for, {done.left_out[0]} the first"
        )
    return 0
