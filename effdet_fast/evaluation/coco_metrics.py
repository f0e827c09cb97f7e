"""pycocotools' numbers from a data set's annotations and arrays of detections."""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING, Any

import numpy as np

from effdet_fast.data.annotations import CocoAnnotations

if TYPE_CHECKING:
    from pycocotools.coco import COCO

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def coco_metrics(annotations: CocoAnnotations, results: list[dict[str, Any]]) -> dict[str, float]:
    """COCO detection metrics of `results` over every image of `annotations`.

    Boxes count as the file has them (not clipped, empty ones included), crowd boxes are regions to ignore; only boxes
    that are not finite are left out. A number that has no ground truth to be computed from is -1, as pycocotools
    gives it.

    Args:
        annotations: what `read_annotations` gave.
        results: COCO results (`image_id`, `category_id`, `bbox` xywh, `score`) with the file's own ids.

    Returns:
        AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl.

    Raises:
        ValueError: a result for an image that the file does not have.
    """
    from pycocotools.cocoeval import COCOeval  # here, as whoever trains without evaluating needs no pycocotools

    known = set(annotations.own_ids.tolist())
    for result in results:
        if result["image_id"] not in known:
            raise ValueError(f"coco_metrics: {annotations.path} has no image with id {result['image_id']!r}")
    with contextlib.redirect_stdout(io.StringIO()):
        truth = _coco(annotations, _truth_rows(annotations))
        found = _coco(annotations, _result_rows(results))
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(METRICS, map(float, evaluation.stats), strict=True))


def _truth_rows(annotations: CocoAnnotations) -> list[dict[str, Any]]:
    a = annotations
    image_ids = [key for key, count in zip(a.own_ids.tolist(), np.diff(a.first), strict=True) for _ in range(count)]
    finite = np.flatnonzero(np.isfinite(a.bbox).all(axis=1)).tolist()
    # Numbered anew from 1: pycocotools marks a match by the annotation's id, so one with id 0 would never be found.
    return [
        {
            "id": number,
            "image_id": image_ids[i],
            "category_id": a.category_ids[a.labels[i]],
            "bbox": a.bbox[i].tolist(),
            "area": float(a.area[i]),
            "iscrowd": int(a.crowd[i]),
        }
        for number, i in enumerate(finite, start=1)
    ]


def _result_rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**result, "id": number, "area": result["bbox"][2] * result["bbox"][3], "iscrowd": 0}
        for number, result in enumerate(results, start=1)
    ]


def _coco(annotations: CocoAnnotations, rows: list[dict[str, Any]]) -> COCO:
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = {
        "images": [{"id": i} for i in annotations.own_ids.tolist()],
        "categories": [{"id": c} for c in annotations.category_ids],
        "annotations": rows,
    }
    coco.createIndex()
    return coco
