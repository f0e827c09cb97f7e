"""From the model's padded detections to boxes in original pixels and COCO results."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from effdet_fast.data.placement import Placement, Size, fit


class ImageResult(NamedTuple):
    """Detections of one image, by descending score: boxes float64 [n, 4] xyxy in original pixels, scores, labels."""

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


def image_results(detections: Any, sizes: Any, image_size: Size) -> list[ImageResult]:
    """Undoes the letterbox.

    Args:
        detections: `ops.Detections` on the CPU, boxes [B, K, 4] xyxy in pixels of an input of `image_size`.
        sizes: [B, 2] original (height, width) of each image.
        image_size: (height, width) of the model's input.

    Returns:
        One result per image, without the padding rows, clipped to the image. Rows that are not finite are left out
        with a warning.
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
    """float32 [B, 2]: (height, width) of the part of an input of `image_size` that shows each image, not padding."""
    return torch.tensor([fit((height, width), image_size) for height, width in np.asarray(sizes).tolist()]).float()


def coco_results(
    results: Sequence[ImageResult], image_ids: Sequence[int | str], category_ids: Sequence[int]
) -> list[dict]:
    """COCO result dicts: `image_id`, `category_id` (the file's own), `bbox` xywh in original pixels, `score`.

    Raises:
        ValueError: a label beyond `category_ids`.
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
