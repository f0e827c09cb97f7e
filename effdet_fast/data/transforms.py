"""Transforms: random and fixed placements of a picture in the model's input.

A transform maps (Placement, generator) to a Placement. A chain of them settles the geometry first, so that the pixels are
decoded and resampled once. `apply` runs a chain on a sample of `CocoDetection`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from PIL import Image

from effdet_fast.data.placement import EXACT_GAP, Placement, Size, blank_input, fit

# A box with less than this many pixels on a side after clipping has vanished.
MIN_SIDE = 1.0


class Transform(Protocol):
    """A function from a placement and a random generator to the next placement."""

    def __call__(self, placement: Placement, rng: np.random.Generator) -> Placement: ...


class HorizontalFlip:
    """A transform that mirrors left and right at random.

    Args:
        p: probability, in [0, 1].

    Raises:
        ValueError: `p` is out of range.
    """

    def __init__(self, p: float = 0.5) -> None:
        self.p = _probability("HorizontalFlip", p)

    def __call__(self, placement: Placement, rng: np.random.Generator) -> Placement:
        return placement.mirrored(x=bool(rng.random() < self.p))


class VerticalFlip:
    """A transform that mirrors top and bottom at random, for pictures without an up and down, such as aerial ones.

    Args:
        p: probability, in [0, 1].

    Raises:
        ValueError: `p` is out of range.
    """

    def __init__(self, p: float = 0.5) -> None:
        self.p = _probability("VerticalFlip", p)

    def __call__(self, placement: Placement, rng: np.random.Generator) -> Placement:
        return placement.mirrored(y=bool(rng.random() < self.p))


class Letterbox:
    """A transform that scales the whole picture to the largest size that fits, at the top left; the rest is padding.

    The aspect ratio stays, as in effdet and automl.

    Args:
        image_size: (height, width) of the model's input in pixels.

    Raises:
        ValueError: `image_size` is not two positive integers.
    """

    def __init__(self, image_size: Size) -> None:
        self.image_size = _size("Letterbox", image_size)

    def __call__(self, placement: Placement, rng: np.random.Generator) -> Placement:
        return replace(placement, scaled=fit(placement.size, self.image_size), output=self.image_size)


class ScaleJitterCrop:
    """A transform that letterboxes at a random scale: the picture is scaled to fit `image_size` times s, s uniform in `scale`.

    A picture larger than the input is cropped at random, around a smaller one the rest is padding. This is the recipe of automl
    and effdet.

    Args:
        image_size: (height, width) of the model's input in pixels.
        scale: smallest and largest s, 0 < smallest <= largest < 100.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, image_size: Size, scale: tuple[float, float] = (0.1, 2.0)) -> None:
        self.image_size = _size("ScaleJitterCrop", image_size)
        low, high = scale
        if not 0 < low <= high < 100:
            raise ValueError(f"ScaleJitterCrop: scale must be 0 < low <= high < 100, got {scale}")
        self.scale = (float(low), float(high))

    def __call__(self, placement: Placement, rng: np.random.Generator) -> Placement:
        scaled = fit(placement.size, self.image_size, float(rng.uniform(*self.scale)))
        # Always two draws, so that what follows in the stream does not depend on the picture's size.
        draws = rng.random(2)
        spare = [max(0, scaled[axis] - self.image_size[axis]) for axis in (0, 1)]
        offset = tuple(int(draws[axis] * (spare[axis] + 1)) for axis in (0, 1))
        return replace(placement, scaled=scaled, output=self.image_size, offset=(offset[0], offset[1]))


def place(size: Size, transforms: Sequence[Transform], rng: np.random.Generator) -> Placement:
    """Place a picture of `size` (height, width) by all `transforms`, one after the other."""
    placement = Placement(size, size, size)
    for transform in transforms:
        placement = transform(placement, rng)
    return placement


def place_boxes(placement: Placement, boxes: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Map boxes to the output and drop those that vanished, with their labels."""
    boxes = placement.apply_boxes(boxes)
    kept = ((boxes[:, 2:] - boxes[:, :2]) >= MIN_SIDE).all(axis=1)
    return boxes[kept], labels[kept]


def apply(
    sample: dict[str, Any],
    transforms: Sequence[Transform],
    rng: np.random.Generator,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
) -> dict[str, Any]:
    """Apply transforms to a sample of `CocoDetection`.

    Args:
        sample: what indexing a `CocoDetection` gives.
        transforms: applied in this order; the last one should be `Letterbox` or `ScaleJitterCrop`, which set the size.
        rng: draws the random numbers.
        mean: RGB color of the padding, in 0..1.

    Returns:
        A copy of the sample. `image`, `boxes`, `labels`, `crowd_boxes` and `crowd_labels` are transformed; boxes with less than a
        pixel left on a side are dropped. `placement` is added.
    """
    image = sample["image"]
    placement = place(image.shape[:2], transforms, rng)
    out = blank_input(placement.output, mean)
    placement.render(Image.fromarray(image), out, EXACT_GAP)
    boxes, labels = place_boxes(placement, sample["boxes"], sample["labels"])
    crowd, crowd_labels = place_boxes(placement, sample["crowd_boxes"], sample["crowd_labels"])
    changed = {"image": out, "boxes": boxes, "labels": labels, "crowd_boxes": crowd, "crowd_labels": crowd_labels}
    return {**sample, **changed, "placement": placement}


def _probability(name: str, p: float) -> float:
    if not 0 <= p <= 1:
        raise ValueError(f"{name}: p must be in [0, 1], got {p}")
    return float(p)


def _size(name: str, size: Size) -> Size:
    if len(size) != 2 or any(int(v) != v or v < 1 for v in size):
        raise ValueError(f"{name}: image_size must be two positive integers (height, width), got {size}")
    return int(size[0]), int(size[1])
