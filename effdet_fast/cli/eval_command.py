"""`effdet-fast eval`."""

from __future__ import annotations

import argparse

from effdet_fast.cli.arguments import add_inference_arguments, image_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", metavar="DIR", required=True, help="folder of the images")
    parser.add_argument("--annotations", metavar="FILE", required=True, help="COCO-format JSON of the images")
    parser.add_argument("--output", metavar="FILE", help="write the detections here, in COCO result format")
    parser.add_argument(
        "--score-threshold",
        type=float,
        metavar="P",
        help="lowest score that counts, in [0, 1] (default: the model's own)",
    )
    add_inference_arguments(parser, batch_size=16)


def run(options: argparse.Namespace) -> int:
    from effdet_fast import evaluate
    from effdet_fast.training.distributed import join_processes

    processes, device = join_processes(options.device)
    metrics = evaluate(
        options.checkpoint,
        options.images,
        options.annotations,
        batch_size=options.batch_size,
        image_size=image_size(options.image_size),  # type: ignore[arg-type]
        workers=options.workers,
        device=device,
        amp=options.amp,
        score_threshold=options.score_threshold,
        iou_threshold=options.iou_threshold,
        max_detections=options.max_detections,
        output=options.output,
        overwrite=options.overwrite,
        progress=options.progress,
    )
    if processes.is_main:
        width = max(map(len, metrics))
        for name, value in metrics.items():
            print(
                f"{name:<{width}} {value:.4f}"
                if value >= 0
                else f"{name:<{width}} - (no such objects in the annotations)"
            )
    return 0
