"""Generated data: small sets of colored rectangles and ellipses on noise, with a COCO annotations file, and random objects."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

COLORS = ((220, 40, 40), (40, 200, 60), (50, 80, 230), (230, 210, 40), (200, 60, 210), (40, 210, 210))


def make_dataset(
    folder: str | Path,
    images: int = 8,
    size: tuple[int, int] = (96, 128),
    seed: int = 0,
    classes: int = 3,
    category_ids: Sequence[int] = (3, 7, 40),
    max_boxes: int = 4,
    suffix: str = ".png",
    first_image_id: int = 100,
) -> tuple[Path, Path]:
    """Writes `images` pictures and `annotations.json` under `folder`; returns (images_dir, annotations_file).

    Class k has color k; odd classes are ellipses, even ones rectangles. `category_ids[:classes]` are the file's ids.
    Where there are three images or more, the last one has no boxes. Image ids start at `first_image_id`, in steps of 3.
    """
    if classes > len(category_ids) or classes > len(COLORS):
        raise ValueError(f"make_dataset: {classes} classes need as many category ids, got {list(category_ids)}")
    rng = np.random.default_rng(seed)
    height, width = size
    images_dir = Path(folder) / "images"
    images_dir.mkdir(parents=True, exist_ok=True)
    image_rows, annotation_rows = [], []
    for i in range(images):
        picture = Image.fromarray(rng.integers(90, 150, (height, width, 3), dtype=np.uint8))
        draw = ImageDraw.Draw(picture)
        image_id = first_image_id + 3 * i
        boxes = 0 if images >= 3 and i == images - 1 else int(rng.integers(1, max_boxes + 1))
        for _ in range(boxes):
            label = int(rng.integers(classes))
            w, h = int(rng.integers(width // 6, width // 3)), int(rng.integers(height // 6, height // 3))
            x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
            shape = draw.ellipse if label % 2 else draw.rectangle
            shape((x, y, x + w - 1, y + h - 1), fill=COLORS[label])
            annotation_rows.append(
                {
                    "id": len(annotation_rows) + 1,
                    "image_id": image_id,
                    "category_id": int(category_ids[label]),
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
        name = f"picture_{i:03d}{suffix}"
        picture.save(images_dir / name)
        image_rows.append({"id": image_id, "file_name": name, "width": width, "height": height})
    categories = [{"id": int(category_ids[k]), "name": f"shape_{k}"} for k in range(classes)]
    annotations_file = Path(folder) / "annotations.json"
    annotations_file.write_text(
        json.dumps({"images": image_rows, "annotations": annotation_rows, "categories": categories})
    )
    return images_dir, annotations_file


def random_objects(
    batch: int, rows: int, image_size: tuple[int, int], num_classes: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded ground truth: the first image has only padding rows, the others fewer and fewer."""
    generator = torch.Generator().manual_seed(seed)
    height, width = image_size
    size = torch.tensor([width, height, width, height], dtype=torch.float32)
    corner = torch.rand(batch, rows, 2, generator=generator) * 0.8
    side = 0.02 + torch.rand(batch, rows, 2, generator=generator) ** 2 * 0.6
    boxes = torch.cat([corner, (corner + side).clamp(max=1.0)], dim=-1) * size
    labels = torch.randint(num_classes, (batch, rows), generator=generator)
    labels[0] = -1
    for image in range(2, batch):
        labels[image, rows - image :] = -1
    boxes[labels < 0] = -1.0
    return boxes, labels
