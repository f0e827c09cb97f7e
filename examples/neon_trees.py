"""Trains a detector to find trees in aerial photographs, on a GPU or on two CPU cores; `neon_data.py` says what data that is.

A random 320 x 320 window of a tile is trained on. EfficientDet-Lite0 starts from ImageNet weights; another model from
--backbone-checkpoint, or from nothing.

    python examples/neon_trees.py [--model efficientdet_lite0] [--output runs/neon_trees] [--data examples/data]
"""

import argparse
import csv
import json
import time
from pathlib import Path

import numpy as np
from neon_data import WEIGHTS, make_data_set
from PIL import Image

import effdet_fast
from effdet_fast.drawing import draw_boxes
from effdet_fast.models import model_config

RECIPE = dict(
    image_size=320,
    epochs=26,
    batch_size=4,
    optimizer="adamw",
    lr=1.5e-3,
    warmup_epochs=2,
    weight_decay=0.01,
    ema_decay=0.99,
    bn_momentum=0.05,
    # A tile is scaled to fit the 320-pixel input times this factor: 1.4 keeps its resolution.
    scale_jitter=(1.2, 1.6),
    vflip=0.5,
    eval_every=5,
    workers=1,  # two cores are better spent on training
    seed=0,
)


def free_folder(folder: Path) -> Path:
    """`folder`, or the first of folder-2, folder-3, ... that does not exist: no run overwrites another."""
    number, free = 1, folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free


def draw_curves(run: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with open(run / "results.csv") as file:
        rows = list(csv.DictReader(file))
    figure, loss_axis = plt.subplots(figsize=(8, 4.5))
    steps = [int(row["step"]) for row in rows]
    loss_axis.plot(steps, [float(row["loss"]) for row in rows], color="tab:blue")
    loss_axis.set(xlabel="step", ylabel="training loss (mean of the epoch)", ylim=(0, None))
    score_axis = loss_axis.twinx()
    for metric, style in (("AP50", "-"), ("AP", "--")):
        scored = [(step, float(row[metric])) for step, row in zip(steps, rows, strict=True) if row[metric]]
        score_axis.plot(*zip(*scored, strict=True), style, color="tab:green", marker="o", label=metric)
    score_axis.set(ylabel="validation", ylim=(0, 1))
    score_axis.legend(loc="upper left")
    figure.tight_layout()
    figure.savefig(run / "curves.png", dpi=120)


def draw_side_by_side(run: Path, tiles: Path, annotations: Path) -> None:
    """Each validation tile twice: with the boxes drawn by hand, and with those the detector found."""
    content = json.loads(annotations.read_text())
    folder = run / "validation"
    folder.mkdir()
    detector = effdet_fast.Detector.from_checkpoint(run / "best.pt")
    for image in content["images"]:
        truth = [a["bbox"] for a in content["annotations"] if a["image_id"] == image["id"] and not a["iscrowd"]]
        boxes = np.array(truth).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        picture = Image.open(tiles / image["file_name"])
        found = detector.predict(picture, score_threshold=0.3)
        right = draw_boxes(
            picture, found.boxes, [f"{score:.2f}" for score in found.scores], [(255, 200, 0)] * len(found.boxes)
        )
        pair = Image.new("RGB", (2 * picture.width + 8, picture.height), "white")
        pair.paste(draw_boxes(picture, boxes, colors=[(0, 255, 120)] * len(boxes)), (0, 0))
        pair.paste(right, (picture.width + 8, 0))
        pair.save(folder / image["file_name"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a tree detector on aerial photographs.")
    parser.add_argument("--model", default="efficientdet_lite0", help="a name of effdet_fast.list_models()")
    parser.add_argument(
        "--backbone-checkpoint", type=Path, help="ImageNet weights; for a Lite0 backbone they are fetched"
    )
    parser.add_argument("--data", type=Path, default=Path("examples/data"), help="where downloads and tiles are kept")
    parser.add_argument("--output", type=Path, default=Path("runs/neon_trees"), help="the run's folder")
    parser.add_argument("--epochs", type=int, default=RECIPE["epochs"])
    arguments = parser.parse_args()
    start = time.monotonic()
    splits = make_data_set(arguments.data)
    weights = arguments.backbone_checkpoint
    if weights is None and model_config(arguments.model).backbone == "efficientnet_lite0":
        weights = arguments.data / Path(WEIGHTS).name
    run = free_folder(arguments.output)
    result = effdet_fast.train(
        train_images=splits["train"][0],
        train_annotations=splits["train"][1],
        val_images=splits["val"][0],
        val_annotations=splits["val"][1],
        model=arguments.model,
        backbone_checkpoint=weights,
        output=run,
        **(RECIPE | {"epochs": arguments.epochs}),
    )
    if result.signal is not None:
        raise SystemExit(f"stopped after {result.steps} steps; to continue: effdet-fast train --resume {result.last}")
    draw_side_by_side(run, *splits["val"])
    try:
        draw_curves(run)
    except ImportError:
        print("no curves.png: pip install matplotlib")
    scores = ", ".join(
        f"{name} {value:.3f}" for name, value in result.metrics.items() if name in ("AP", "AP50", "AP75")
    )
    print(f"{scores} on {len(list(splits['val'][0].glob('*.png')))} validation tiles; {result.steps} steps")
    print(f"{run}: best.pt, results.csv, curves.png, validation/*.png; {(time.monotonic() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
