"""`effdet-fast export`."""

from __future__ import annotations

import argparse

from effdet_fast.cli.arguments import add_image_size, add_iou_threshold, image_size

# As `effdet_fast.export.to_file.FORMATS`, which --help need not import torch for.
FORMATS = ("onnx", "torch_export")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="best.pt or last.pt of a run, or what convert wrote")
    parser.add_argument(
        "output", metavar="OUTPUT", nargs="?", help="file to write (default: CHECKPOINT with the format's ending)"
    )
    parser.add_argument(
        "--format", choices=FORMATS, help="default: by the ending of OUTPUT, .onnx or .pt2 (of torch.export)"
    )
    parser.add_argument(
        "--end-to-end",
        action="store_true",
        help="with non-maximum suppression inside: boxes, scores, labels and counts of fixed shapes "
        "(default: boxes and scores of all anchors)",
    )
    add_image_size(parser)
    end_to_end = parser.add_argument_group("with --end-to-end")
    end_to_end.add_argument(
        "--score-threshold",
        type=float,
        metavar="P",
        help="lowest score kept, in [0, 1] (default: the model's own)",
    )
    add_iou_threshold(end_to_end)
    end_to_end.add_argument(
        "--max-detections", type=int, metavar="N", help="boxes per image (default: the model's own)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing output")


def run(options: argparse.Namespace) -> int:
    from effdet_fast import export_model

    done = export_model(
        options.checkpoint,
        options.output,
        options.format,
        end_to_end=options.end_to_end,
        image_size=image_size(options.image_size),  # type: ignore[arg-type]
        score_threshold=options.score_threshold,
        iou_threshold=options.iou_threshold,
        max_detections=options.max_detections,
        overwrite=options.overwrite,
    )
    print(f"{done['path']}: {done['model']}, {len(done['class_names'])} classes\n  {done['input']}")
    for name, text in done["outputs"].items():
        print(f"  {name}: {text}")
    return 0
