"""`effdet-fast predict`."""

from __future__ import annotations

import argparse

from effdet_fast.cli.arguments import add_inference_arguments, image_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", metavar="PATH", required=True, help="an image, or a folder of images")
    parser.add_argument(
        "--output", metavar="DIR", required=True, help="pictures with boxes and detections.json go here"
    )
    parser.add_argument(
        "--annotations",
        metavar="FILE",
        help="COCO-format JSON that gives the images and their ids (default: every image, ids from numeric file names "
        "or counted from 1)",
    )
    parser.add_argument(
        "--score-threshold", type=float, default=0.3, metavar="P", help="lowest score kept, in [0, 1] (default: 0.3)"
    )
    parser.add_argument(
        "--draw",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write pictures, not detections.json alone (default: yes)",
    )
    add_inference_arguments(parser, batch_size=8)


def run(options: argparse.Namespace) -> int:
    from effdet_fast import predict
    from effdet_fast.device import choose_device

    results = predict(
        options.checkpoint,
        options.images,
        options.output,
        annotations=options.annotations,
        score_threshold=options.score_threshold,
        iou_threshold=options.iou_threshold,
        max_detections=options.max_detections,
        batch_size=options.batch_size,
        image_size=image_size(options.image_size),  # type: ignore[arg-type]
        workers=options.workers,
        device=choose_device(options.device),
        amp=options.amp,
        draw=options.draw,
        overwrite=options.overwrite,
        progress=options.progress,
    )
    what = "pictures and detections.json are" if options.draw else "detections.json is"
    print(f"{len(results)} detections; {what} in {options.output}")
    return 0
