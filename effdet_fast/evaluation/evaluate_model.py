"""Evaluation of a model over a loader, on one process or several."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from effdet_fast.data import Batch, BatchLoader, CocoDetection, normalize
from effdet_fast.device import autocast
from effdet_fast.evaluation.coco_metrics import coco_metrics
from effdet_fast.evaluation.results import coco_results, image_results, letterbox_sizes
from effdet_fast.models.detection_model import check_detection_options


def evaluate_model(
    model: nn.Module,
    loader: BatchLoader,
    dataset: CocoDetection,
    *,
    device: torch.device | str,
    amp: str | torch.dtype | None = None,
    score_threshold: float | None = None,
    iou_threshold: float | None = None,
    max_detections: int = 100,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = False,
) -> dict[str, float]:
    """Compute the COCO metrics of a model on a data set; all processes get the same.

    Args:
        model: a `DetectionModel`, perhaps inside DistributedDataParallel. It runs in evaluation mode; its own mode comes back.
        loader: `create_loader(dataset, ..., training=False)` of this process.
        dataset: the `CocoDetection` with the ground truth.
        device: where the model is.
        amp: precision of the forward pass: None (float32), "bf16", "fp16" or a dtype.
        score_threshold: detections with a lower score are dropped; None takes the model's own threshold. An EfficientDet's
            keeps all.
        iou_threshold: of the per-class non-maximum suppression; None takes the model's own.
        max_detections: largest number of detections on an image. Another than COCO's 100 adds metrics; see `coco_metrics`.
        rank: index of this process.
        world_size: number of processes; with more than one, torch.distributed must be initialized.
        progress: show a progress bar on rank 0.

    Returns:
        AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl, and those at `max_detections`; see `coco_metrics`.

    Raises:
        ValueError: the loader is one for training, or does not give each image of `dataset` once; or an option is out of range.
    """
    results = detect_all(
        model,
        loader,
        dataset,
        device=device,
        amp=amp,
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
        max_detections=max_detections,
        rank=rank,
        world_size=world_size,
        progress=progress,
    )
    return shared_metrics(dataset, results, max_detections, rank, world_size)


def detect_all(
    model: nn.Module,
    loader: BatchLoader,
    dataset: CocoDetection,
    *,
    device: torch.device | str,
    amp: str | torch.dtype | None = None,
    score_threshold: float | None = None,
    iou_threshold: float | None = None,
    max_detections: int = 100,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = False,
) -> list[dict]:
    """Detect the objects on every image of a data set.

    Args:
        model: as for `evaluate_model`.
        loader: as for `evaluate_model`.
        dataset: as for `evaluate_model`.
        device: as for `evaluate_model`.
        amp: as for `evaluate_model`.
        score_threshold: as for `evaluate_model`.
        iou_threshold: as for `evaluate_model`.
        max_detections: as for `evaluate_model`.
        rank: as for `evaluate_model`.
        world_size: as for `evaluate_model`.
        progress: as for `evaluate_model`.

    Returns:
        COCO results: on rank 0 those of all processes, elsewhere the process's own.

    Raises:
        ValueError: as `evaluate_model`.
    """
    if getattr(loader, "training", False):
        raise ValueError("evaluate_model: loader must be made with training=False; this one shuffles and augments")
    check_detection_options("evaluate_model", score_threshold, iou_threshold, max_detections)
    device = torch.device(device)
    bar = tqdm(total=len(loader), desc="evaluating", disable=not progress or rank > 0, leave=False)
    results: list[dict] = []
    seen: list[int] = []
    options = {"score_threshold": score_threshold, "iou_threshold": iou_threshold, "max_detections": max_detections}
    with _evaluating(model), torch.inference_mode(), bar:
        pending: tuple[Any, Batch] | None = None
        for batch in loader:
            detections = _detect(model, batch, loader, device, amp, options)
            # A batch is read back after the next one was launched, so that the device does not wait for the host.
            if pending is not None:
                _collect(*pending, dataset, seen, results)
            pending = detections, batch
            bar.update()
        if pending is not None:
            _collect(*pending, dataset, seen, results)
    if world_size > 1:
        gathered: list[Any] = [None] * world_size
        dist.all_gather_object(gathered, (seen, results))
        if rank == 0:
            seen = [i for part in gathered for i in part[0]]
            results = [r for part in gathered for r in part[1]]
    if rank == 0 and sorted(seen) != sorted(dataset.annotations.image_ids.tolist()):
        raise ValueError(
            f"evaluate_model: the loader must give each of the {len(dataset)} images once, "
            f"got {len(set(seen))} of them in {len(seen)} places"
        )
    return results


def shared_metrics(
    dataset: CocoDetection, results: list[dict], max_detections: int, rank: int, world_size: int
) -> dict[str, float]:
    """Compute the metrics of the results that `detect_all` returned on rank 0, and share them with all processes."""
    metrics = [coco_metrics(dataset.annotations, results, max_detections)] if rank == 0 else [{}]
    if world_size > 1:
        dist.broadcast_object_list(metrics, src=0)
    return metrics[0]


def _detect(
    model: nn.Module,
    batch: Batch,
    loader: BatchLoader,
    device: torch.device,
    amp: str | torch.dtype | None,
    options: dict[str, Any],
) -> Any:
    images = normalize(batch.images.to(device, non_blocking=True), loader.mean, loader.std)
    with autocast(device, amp):
        outputs = model(images)
    # DistributedDataParallel and its like forward calls, not methods.
    plain: Any = getattr(model, "module", model)
    visible = letterbox_sizes(batch.sizes, loader.image_size).to(device, non_blocking=True)
    return plain.detect(outputs, clip_sizes=visible, **options)


def _collect(detections: Any, batch: Batch, dataset: CocoDetection, seen: list[int], results: list[dict]) -> None:
    on_cpu = type(detections)(*(t.cpu() for t in detections))
    height, width = batch.images.shape[2:]
    found = image_results(on_cpu, batch.sizes, (int(height), int(width)))
    image_ids = batch.image_ids.tolist()
    seen.extend(image_ids)
    own_ids = [dataset.annotations.own_id(i) for i in image_ids]
    results.extend(coco_results(found, own_ids, dataset.category_ids))


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
