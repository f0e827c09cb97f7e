"""The data a run trains and evaluates on, and what its labels mean."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

from torch import Tensor

from effdet_fast.data import BatchLoader, CocoDetection, create_loader
from effdet_fast.data.annotations import SHOWN
from effdet_fast.models import model_config
from effdet_fast.training.config import TrainConfig
from effdet_fast.training.data_record import record_data
from effdet_fast.training.distributed import Processes


@dataclasses.dataclass
class RunData:
    """The data of a run: loaders of this process's share, and what the labels mean.

    `record` tells a resumed run what has changed; see `record_data`.
    """

    train_loader: BatchLoader
    val_loader: BatchLoader | None
    val_dataset: CocoDetection | None
    class_names: list[str]
    category_ids: list[int]
    record: Tensor

    def old_record(self) -> str:
        """What checkpoints held before they had `record`."""
        dataset = self.train_loader.coco
        return f"{len(dataset)} images, ids crc32 {zlib.crc32(repr(dataset.image_ids).encode()):08x}"


def open_data(config: TrainConfig, processes: Processes, category_ids: list[int] | None = None) -> RunData:
    """Read and check both data sets of a run, before anything else is made.

    Args:
        category_ids: Of a resumed run's labels; None takes the training file's own.

    Raises:
        ValueError: No images, no categories, or what `CocoDetection` finds wrong.
    """
    train_set = CocoDetection(
        config.train_images, config.train_annotations, category_ids=category_ids, depth=config.depth
    )
    if len(train_set) == 0:
        raise ValueError(f"train: {config.train_annotations} lists no images")
    if not train_set.category_ids:
        raise ValueError(f"train: {config.train_annotations} lists no categories")
    if not train_set.annotations.trainable.any():
        raise ValueError(
            f"train: {config.train_annotations} has no box to train on; it has {len(train_set.annotations.bbox)} annotations"
        )
    released = model_config(config.model)
    image_size = config.image_size or released.image_size
    common: dict[str, Any] = {
        "image_size": image_size,
        "batch_size": config.batch_size,
        "mean": released.mean,
        "std": released.std,
        "workers": config.workers,
        "seed": config.seed,
        "rank": processes.rank,
        "world_size": processes.world_size,
    }
    augmentation: dict[str, Any] = {"hflip": config.hflip, "vflip": config.vflip, "scale_jitter": config.scale_jitter}
    val_set = val_loader = None
    if config.val_images is not None and config.val_annotations is not None:
        val_set = CocoDetection(
            config.val_images, config.val_annotations, category_ids=train_set.category_ids, depth=train_set.depth
        )
        if differing := val_set.differing_names(train_set.class_names):
            raise ValueError(
                f"train: {config.val_annotations} numbers its categories differently from {config.train_annotations}: "
                f"{'; '.join(differing[:SHOWN])}; give both files the same categories"
            )
        val_loader = create_loader(val_set, training=False, **common)
    return RunData(
        train_loader=create_loader(train_set, training=True, **common, **augmentation),
        val_loader=val_loader,
        val_dataset=val_set,
        class_names=train_set.class_names,
        category_ids=train_set.category_ids,
        record=record_data(train_set),
    )
