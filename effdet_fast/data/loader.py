"""The data loader, which decodes and transforms pictures in worker processes."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from effdet_fast.data.batch import Batch, object_rows
from effdet_fast.data.coco import CocoDetection
from effdet_fast.data.placement import EXACT_GAP, TRAINING_GAP, Size, blank_input
from effdet_fast.data.sampler import EvaluationBatches, Key, TrainingBatches
from effdet_fast.data.transforms import (
    HorizontalFlip,
    Letterbox,
    ScaleJitterCrop,
    Transform,
    VerticalFlip,
    place,
    place_boxes,
)


class LoaderProcessLost(RuntimeError):
    """A worker process of a loader has died, often because the system ran out of memory."""


class BatchLoader(DataLoader):
    """A `DataLoader` of `Batch`, which can start at any batch of any epoch; `create_loader` makes it.

    `len()` is the number of batches in a whole epoch, wherever it is started.

    Args:
        source: Dataset that makes whole batches.
        batches: Sampler of the images of each batch.
        **options: Further arguments of `torch.utils.data.DataLoader`.

    Attributes:
        training: whether batches are shuffled and augmented.
        image_size: (height, width) of the images in pixels.
        mean: RGB mean to normalize with, in 0..1.
        std: RGB standard deviation, likewise.
        coco: the `CocoDetection`.
    """

    def __init__(self, source: _BatchSource, batches: TrainingBatches | EvaluationBatches, **options: Any) -> None:
        self.training = isinstance(batches, TrainingBatches)
        self.image_size = source.image_size
        self.mean, self.std = source.mean, source.std
        self.coco = source.coco
        self.batches = batches
        super().__init__(source, batch_sampler=batches, collate_fn=_already_a_batch, **options)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except Exception as error:
            if lost := self.lost_process():
                raise lost from error
            raise

    def lost_process(self) -> LoaderProcessLost | None:
        """Return the error to raise if a worker process of this loader has died, else None.

        PyTorch itself then raises anything from a RuntimeError to a ConnectionResetError, wherever the main process happens to
        be.
        """
        for worker in getattr(getattr(self, "_iterator", None), "_workers", ()):
            worker.join(0.1)
            if worker.exitcode:
                how = f"signal {-worker.exitcode}" if worker.exitcode < 0 else f"status {worker.exitcode}"
                return LoaderProcessLost(
                    f"a data-loading process ended by {how}, often for want of memory: use fewer --workers"
                )
        return None

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch of the next iteration, and the batch to start from; the batches are those of an uninterrupted run.

        Args:
            epoch: counted from 0.
            start_batch: in [0, len(self)].

        Raises:
            ValueError: a number is out of range.
        """
        if epoch < 0:
            raise ValueError(f"set_epoch: epoch must not be negative, got {epoch}")
        if not 0 <= start_batch <= len(self):
            raise ValueError(f"set_epoch: start_batch must be in [0, {len(self)}], got {start_batch}")
        self.batches.epoch = int(epoch)
        self.batches.start_batch = int(start_batch)


def create_loader(
    dataset: CocoDetection,
    *,
    image_size: Size | int,
    batch_size: int,
    training: bool,
    mean: Sequence[float],
    std: Sequence[float],
    workers: int = 4,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    hflip: float = 0.5,
    vflip: float = 0.0,
    scale_jitter: tuple[float, float] | None = (0.1, 2.0),
    drop_last: bool = False,
    pin_memory: bool | None = None,
    prefetch: int = 4,
) -> BatchLoader:
    """Make a loader for training (shuffled, augmented) or evaluation (in order, letterboxed, each image once).

    Batches depend on (seed, epoch, index) alone, not on the number of workers. Images come as uint8, padded with the
    mean color; `normalize` them on the device.

    Args:
        dataset: images and boxes.
        image_size: (height, width) of the model's input in pixels; one number for both.
        batch_size: images per batch and process. Training batches are always full, evaluation's last one need not be.
        training: shuffle and augment. The flips, the jitter and `drop_last` are for training only.
        mean: RGB mean of the model, in 0..1. Padding has this color, and the loader keeps it as an attribute for `normalize`.
        std: RGB standard deviation of the model, which the loader keeps too.
        workers: worker processes; 0 loads in this process.
        seed: of order and augmentation, >= 0.
        rank: index of this process among those that share the data set.
        world_size: number of these processes.
        hflip: probability of a horizontal flip.
        vflip: probability of a vertical flip.
        scale_jitter: range of `ScaleJitterCrop`; None letterboxes.
        drop_last: leave an incomplete last batch out; else images of the epoch's start fill it up.
        pin_memory: put batches in pinned memory; None does so where there is a GPU.
        prefetch: batches that each worker keeps ready.

    Returns:
        A `BatchLoader`; call its `set_epoch` before each epoch of training.

    Raises:
        ValueError: a size, count or probability is out of range.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else (int(image_size[0]), int(image_size[1]))
    if batch_size < 1 or workers < 0 or prefetch < 1:
        raise ValueError(
            f"create_loader: batch_size, workers, prefetch must be >= 1, 0, 1, got {batch_size}, {workers}, {prefetch}"
        )
    if not 0 <= rank < world_size:
        raise ValueError(f"create_loader: rank must be in [0, {world_size}), got {rank}")
    if seed < 0:
        raise ValueError(f"create_loader: seed must not be negative, got {seed}")
    transforms: list[Transform] = [Letterbox(size)]
    batches: TrainingBatches | EvaluationBatches
    if training:
        resize: Transform = Letterbox(size) if scale_jitter is None else ScaleJitterCrop(size, scale_jitter)
        transforms = [HorizontalFlip(hflip), VerticalFlip(vflip), resize]
        batches = TrainingBatches(
            len(dataset), batch_size, seed=seed, rank=rank, world_size=world_size, drop_last=drop_last
        )
    else:
        batches = EvaluationBatches(len(dataset), batch_size, rank=rank, world_size=world_size)
    source = _BatchSource(dataset, transforms, size, mean, std, seed, TRAINING_GAP if training else EXACT_GAP)
    return BatchLoader(
        source,
        batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        prefetch_factor=prefetch if workers > 0 else None,
        pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
        worker_init_fn=_start_worker,
        # Of its own, as DataLoader draws from its generator each epoch: torch's global stream stays the trainer's.
        generator=torch.Generator(),
    )


class _BatchSource(Dataset):
    """Makes whole batches, so that each image is written once, straight to its place in the batch."""

    def __init__(
        self,
        coco: CocoDetection,
        transforms: list[Transform],
        image_size: Size,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        gap: float,
    ) -> None:
        self.coco, self.transforms, self.image_size = coco, transforms, image_size
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        self.seed, self.gap = seed, gap
        self.blank = blank_input(image_size, self.mean)

    def __getitem__(self, key: Key) -> Batch:
        return self.__getitems__([key])

    def __getitems__(self, keys: list[Key]) -> Batch:
        n = len(keys)
        pixels = torch.empty((n, *self.image_size, 3), dtype=torch.uint8)
        array = pixels.numpy()
        array[:] = self.blank
        boxes, labels, scales = [], [], []
        for row, (epoch, i) in enumerate(keys):
            placement = place(self.coco.size(i), self.transforms, np.random.default_rng([self.seed, epoch, i]))
            picture = self.coco.open(i, placement.decode_size(self.gap))
            placement.render(picture, array[row], self.gap)
            placed = place_boxes(placement, *self.coco.boxes(i))
            boxes.append(placed[0])
            labels.append(placed[1])
            scales.append(max(placement.scaled) / max(placement.size))
        gt_boxes, gt_labels = _pad(boxes, labels)
        indices = [i for _, i in keys]
        return Batch(
            images=pixels.permute(0, 3, 1, 2),
            gt_boxes=gt_boxes,
            gt_labels=gt_labels,
            image_ids=torch.from_numpy(self.coco.annotations.image_ids[indices]),
            scales=torch.tensor(scales, dtype=torch.float32),
            sizes=torch.from_numpy(self.coco.annotations.sizes[indices]),
        )


def _pad(boxes: list[np.ndarray], labels: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    rows = object_rows(max(len(b) for b in boxes))
    gt_boxes = torch.zeros((len(boxes), rows, 4))
    gt_labels = torch.full((len(boxes), rows), -1, dtype=torch.int64)
    for i, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        gt_boxes[i, : len(box)] = torch.from_numpy(box)
        gt_labels[i, : len(label)] = torch.from_numpy(label)
    return gt_boxes, gt_labels


def _already_a_batch(batch: Any) -> Any:
    return batch


def _start_worker(worker: int) -> None:
    # Ctrl-C and a closed terminal reach the whole process group; the main process decides and ends the workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
