"""COCO metrics of detections, computed by pycocotools."""

from __future__ import annotations

import contextlib
import io
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from effdet_fast.data.annotations import CocoAnnotations

if TYPE_CHECKING:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""COCO's twelve metrics, in pycocotools' order. Small objects (s) have fewer than 32^2 pixels, large ones (l) more than 96^2."""
COCO_LIMIT = 100  # detections of an image and class that COCO's own numbers count
_AREAS = {"": 0, "s": 1, "m": 2, "l": 3}  # as COCOeval numbers them


def coco_metrics(
    annotations: CocoAnnotations, results: list[dict[str, Any]], max_detections: int = COCO_LIMIT
) -> dict[str, float]:
    """Compute COCO's metrics of detections over every image of a data set.

    Ground-truth boxes count as the file has them, not clipped and empty ones included; those that are not finite are left out.
    Crowd boxes are regions to ignore. A warning tells of images with more objects than `max_detections`.

    Args:
        annotations: what `read_annotations` gave, a data set's `annotations`.
        results: COCO results (`image_id`, `category_id`, `bbox` xywh, `score`) with the file's own ids.
        max_detections: COCO's metrics count 100 detections of each image and class. Another limit M adds metrics that count M.

    Returns:
        AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl; with another limit M also AP@M, AP50@M, AP75@M and AR@M.
        A metric without ground truth is -1, as in pycocotools.

    Raises:
        ValueError: a result is for an image that the file does not have.
    """
    from pycocotools.cocoeval import COCOeval  # here, as whoever trains without evaluating needs no pycocotools

    _warn_of_many_objects(annotations, max_detections)
    known = set(annotations.own_ids.tolist())
    for result in results:
        if result["image_id"] not in known:
            raise ValueError(f"coco_metrics: {annotations.path} has no image with id {result['image_id']!r}")
    with contextlib.redirect_stdout(io.StringIO()):
        truth = _coco(annotations, _truth_rows(annotations))
        found = _coco(annotations, _result_rows(results))
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.maxDets = sorted({1, 10, COCO_LIMIT, max_detections})
        evaluation.evaluate()
        evaluation.accumulate()
    return _summary(evaluation, max_detections)


def _summary(evaluation: COCOeval, max_detections: int) -> dict[str, float]:
    """Summarize for any limit; COCOeval's own method is written for limits of 1, 10 and 100."""
    limits = {limit: i for i, limit in enumerate(evaluation.params.maxDets)}
    thresholds = {0.5: 0, 0.75: 5}

    def mean(values: np.ndarray) -> float:
        values = values[values > -1]
        return float(np.mean(values)) if values.size else -1.0

    def precision(limit: int, iou: float | None = None, area: str = "") -> float:
        which = slice(None) if iou is None else slice(thresholds[iou], thresholds[iou] + 1)
        return mean(evaluation.eval["precision"][which, :, :, _AREAS[area], limits[limit]])

    def recall(limit: int, area: str = "") -> float:
        return mean(evaluation.eval["recall"][:, :, _AREAS[area], limits[limit]])

    values = [precision(COCO_LIMIT), precision(COCO_LIMIT, 0.5), precision(COCO_LIMIT, 0.75)]
    values += [precision(COCO_LIMIT, area=area) for area in "sml"]
    values += [recall(limit) for limit in (1, 10, COCO_LIMIT)]
    values += [recall(COCO_LIMIT, area) for area in "sml"]
    metrics = dict(zip(METRICS, values, strict=True))
    if max_detections != COCO_LIMIT:
        for name, iou in (("AP", None), ("AP50", 0.5), ("AP75", 0.75)):
            metrics[f"{name}@{max_detections}"] = precision(max_detections, iou)
        metrics[f"AR@{max_detections}"] = recall(max_detections)
    return metrics


def _warn_of_many_objects(annotations: CocoAnnotations, limit: int) -> None:
    counts = np.bincount(
        np.repeat(np.arange(len(annotations.image_ids)), np.diff(annotations.first))[~annotations.crowd], minlength=1
    )
    crowded = int((counts > limit).sum())
    if crowded:
        most = int(counts.argmax())
        warnings.warn(
            f"{annotations.path}: {crowded} of {len(annotations.image_ids)} images have more objects than the {limit} detections "
            f"that are counted ({annotations.file_names[most]} has {counts[most]}); raise max_detections to count them all",
            stacklevel=3,
        )


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
