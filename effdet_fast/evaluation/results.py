"""Conversion of a model's padded detections to boxes in pixels of the original pictures, and to COCO results."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from effdet_fast.data.placement import Placement, Size, fit


class ImageResult(NamedTuple):
    """The detections of one image, by descending score.

    Attributes:
        boxes: float64 [n, 4] xyxy in pixels of the original image.
        scores: float64 [n] in 0..1.
        labels: int64 [n], 0-based.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


def image_results(detections: Any, sizes: Any, image_size: Size) -> list[ImageResult]:
    """Map detections from the letterboxed input back to the original images.

    Args:
        detections: `effdet_fast.ops.Detections` on the CPU, boxes [B, K, 4] xyxy in pixels of an input of `image_size`.
        sizes: [B, 2], (height, width) of each original image.
        image_size: (height, width) of the model's input.

    Returns:
        One `ImageResult` for each image, without padding rows, its boxes clipped to the image. A warning counts the rows that are
        not finite, which are left out.
    """
    boxes, scores, labels = (
        getattr(detections, name).detach().float().numpy() for name in ("boxes", "scores", "labels")
    )
    counts = detections.counts.tolist()
    results, broken = [], 0
    for i, (height, width) in enumerate(np.asarray(sizes).tolist()):
        rows = slice(0, counts[i])
        finite = np.isfinite(boxes[i, rows]).all(axis=1) & np.isfinite(scores[i, rows])
        broken += int((~finite).sum())
        placement = Placement.letterbox((height, width), image_size)
        results.append(
            ImageResult(
                placement.undo_boxes(boxes[i, rows][finite]),
                scores[i, rows][finite].astype(np.float64),
                labels[i, rows][finite].astype(np.int64),
            )
        )
    if broken:
        warnings.warn(f"{broken} detections with a box or score that is not finite were left out", stacklevel=2)
    return results


def letterbox_sizes(sizes: Any, image_size: Size) -> torch.Tensor:
    """Compute the part of a letterboxed input that shows each image rather than padding.

    Args:
        sizes: [B, 2], (height, width) of each original image.
        image_size: (height, width) of the model's input.

    Returns:
        float32 [B, 2], (height, width) of that part, which starts at the top left. `DetectionModel.detect` clips to it.
    """
    return torch.tensor([fit((height, width), image_size) for height, width in np.asarray(sizes).tolist()]).float()


def coco_results(
    results: Sequence[ImageResult], image_ids: Sequence[int | str], category_ids: Sequence[int]
) -> list[dict]:
    """Convert detections to COCO results.

    Args:
        results: the detections of each image.
        image_ids: id of each image in the annotations file.
        category_ids: category id of each label.

    Returns:
        A dict for each detection: `image_id`, `category_id`, `bbox` xywh in pixels of the original image, `score`.

    Raises:
        ValueError: a label has no category id, or there are not as many ids as images.
    """
    rows: list[dict] = []
    for result, image_id in zip(results, image_ids, strict=True):
        if len(result.labels) and not 0 <= result.labels.min() <= result.labels.max() < len(category_ids):
            worst = result.labels.max()
            raise ValueError(f"coco_results: label {worst} has no category id; there are {len(category_ids)} classes")
        own_id = image_id if isinstance(image_id, str) else int(image_id)
        xywh = np.concatenate([result.boxes[:, :2], result.boxes[:, 2:] - result.boxes[:, :2]], axis=1)
        for box, score, label in zip(xywh.tolist(), result.scores.tolist(), result.labels.tolist(), strict=True):
            category = int(category_ids[label])
            rows.append({"image_id": own_id, "category_id": category, "bbox": box, "score": score})
    return rows
