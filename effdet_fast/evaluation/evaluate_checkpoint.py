"""Evaluation of a checkpoint on an annotated folder. `effdet-fast eval` calls this."""

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
    """Compute the COCO metrics of a trained detector on an annotated folder.

    If torch.distributed is initialized, each process takes its share of the images, and all get the same metrics.

    Args:
        checkpoint: a `best.pt` or `last.pt`.
        images: folder of the images.
        annotations: COCO file; its categories must be among those of the checkpoint.
        batch_size: images per batch and process.
        image_size: input side or (height, width) in pixels, if other than the one trained at.
        workers: data-loading processes; 0 loads in this process.
        device: None takes the GPU if there is one.
        amp: precision of the forward pass: None (float32), "bf16" or "fp16".
        score_threshold: detections with a lower score are dropped; None takes the model's own threshold. An EfficientDet's
            keeps all.
        iou_threshold: of the per-class non-maximum suppression; None takes the model's own.
        max_detections: largest number of detections on an image. Another than COCO's 100 adds metrics; see `coco_metrics`.
        output: file to write the detections to, as COCO results.
        overwrite: replace an existing `output`.
        progress: show a progress bar.

    Returns:
        AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl, and those at `max_detections`; -1 where there is no
        ground truth.

    Raises:
        FileExistsError: `output` exists.
        FileNotFoundError: the checkpoint, the folder or the annotations file is missing.
        ValueError: the checkpoint or the data cannot be used (see `load_trained_model` and `CocoDetection`), or an option is out
            of range.

    Example:
        ```python
        metrics = effdet_fast.evaluate("runs/exp1/best.pt", "val/images", "val/annotations.json")
        print(metrics["AP"], metrics["AP50"])
        ```
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
