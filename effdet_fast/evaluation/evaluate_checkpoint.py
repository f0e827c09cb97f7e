"""COCO metrics of a checkpoint on an annotated folder: what `effdet-fast eval` calls."""

from __future__ import annotations

import os
import warnings

import torch
import torch.distributed as dist

from effdet_fast.data import CocoDetection, create_loader
from effdet_fast.evaluation.evaluate_model import detect_all, shared_metrics
from effdet_fast.evaluation.trained_model import load_trained_model
from effdet_fast.files import check_writable, refuse_existing, write_json
from effdet_fast.models.detection_model import check_detection_options


def evaluate(
    checkpoint: str | os.PathLike[str],
    images: str | os.PathLike[str],
    annotations: str | os.PathLike[str],
    *,
    batch_size: int = 16,
    image_size: int | tuple[int, int] | None = None,
    workers: int = 4,
    device: torch.device | str | None = None,
    amp: str | torch.dtype | None = None,
    score_threshold: float | None = None,
    iou_threshold: float | None = None,
    max_detections: int = 100,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, float]:
    """pycocotools' 12 numbers of a trained detector.

    Inside torch.distributed every rank takes its share of the images and gets the same numbers.

    Args:
        checkpoint: `best.pt` or `last.pt`.
        images: folder.
        annotations: COCO file; its categories must be among those of the checkpoint.
        image_size: another input size than the one trained at.
        device: None takes the GPU if there is one.
        amp: None, "bf16" or "fp16".
        score_threshold: None takes the model's own; EfficientDets keep every detection.
        max_detections: per image; another limit than COCO's 100 adds AP@M and its like, see `coco_metrics`.
        output: file for the detections, in COCO's result format.
        overwrite: whether `output` may exist.
        progress: show a bar.

    Returns:
        AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl, and those at `max_detections`; -1 where there is no
        ground truth.

    Raises:
        FileExistsError: `output` exists.
        FileNotFoundError, ValueError: of the checkpoint or the data; see `load_trained_model` and `CocoDetection`.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    check_detection_options("eval", score_threshold, iou_threshold, max_detections)
    if output is not None and rank == 0:
        refuse_existing([os.fspath(output)], overwrite)
        check_writable(os.fspath(output))
    trained = load_trained_model(checkpoint, device, image_size)
    dataset = CocoDetection(images, annotations, category_ids=trained.category_ids, depth=trained.depth)
    _compare_names(dataset, trained.class_names, os.fspath(checkpoint))
    loader = create_loader(
        dataset,
        image_size=trained.image_size,
        batch_size=batch_size,
        training=False,
        mean=trained.mean,
        std=trained.std,
        workers=workers,
        rank=rank,
        world_size=world_size,
    )
    results = detect_all(
        trained.model,
        loader,
        dataset,
        device=trained.device,
        amp=amp,
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
        max_detections=max_detections,
        rank=rank,
        world_size=world_size,
        progress=progress,
    )
    if output is not None and rank == 0:
        write_json(os.fspath(output), results)
    return shared_metrics(dataset, results, max_detections, rank, world_size)


def _compare_names(dataset: CocoDetection, names: list[str], checkpoint: str) -> None:
    if differing := dataset.differing_names(names):
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        warnings.warn(
            f"{dataset.annotations_file}: names its categories differently from {checkpoint}: "
            f"{'; '.join(differing[:5])}{more}",
            stacklevel=3,
        )
