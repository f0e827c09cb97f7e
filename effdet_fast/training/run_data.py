"""The data of a run: loaders, what labels mean, and what has changed in the images when the run is resumed."""

from __future__ import annotations

import dataclasses
import hashlib
import zlib
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from effdet_fast.data import BatchLoader, CocoDetection, create_loader
from effdet_fast.data.annotations import SHOWN
from effdet_fast.models import model_config
from effdet_fast.training.config import TrainConfig
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
        config: Options of the run.
        processes: Processes that share the images.
        category_ids: Category id of each label of a resumed run; None takes the training file's own.

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
    model = model_config(config.model, **config.model_options)
    image_size = config.image_size or model.image_size
    common: dict[str, Any] = {
        "image_size": image_size,
        "batch_size": config.batch_size,
        "mean": model.mean,
        "std": model.std,
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


_ID, _NAME, _BOXES = range(3)


class DataChange(NamedTuple):
    """How the images of a run differ from those of its checkpoint, in numbers of images.

    `kept` have the same id, and the same file name or the same boxes: ids alone are the same in most files.
    """

    added: int
    removed: int
    renamed: int
    reboxed: int
    moved: int
    kept: int

    @property
    def same_images(self) -> bool:
        """Whether an epoch gives the same images in the same order."""
        return not (self.added or self.removed or self.moved)

    def __bool__(self) -> bool:
        return not self.same_images or bool(self.renamed or self.reboxed)

    def describe(self) -> str:
        parts = (
            (self.removed, "removed"),
            (self.added, "added"),
            (self.renamed, "with another file name"),
            (self.reboxed, "with other boxes or classes"),
            (self.moved, "in another place of the file"),
        )
        return ", ".join(f"{count} {what}" for count, what in parts if count)


def record_data(dataset: CocoDetection) -> Tensor:
    """int64 [I, 3], a row per image: its id, and checksums of its file name and of its boxes with their categories."""
    a = dataset.annotations
    categories = np.array(a.category_ids)[a.labels]
    rows = []
    for i, (own_id, name) in enumerate(zip(a.own_ids.tolist(), a.file_names, strict=True)):
        owned = slice(a.first[i], a.first[i + 1])
        boxes = b"".join(part[owned].tobytes() for part in (a.bbox, categories, a.crowd))
        number = _checksum(_encoded(own_id)) if isinstance(own_id, str) else own_id
        rows.append((number, _checksum(_encoded(name)), _checksum(boxes)))
    return torch.tensor(rows, dtype=torch.int64)


def compare_data(before: Tensor, now: Tensor) -> DataChange:
    """What has changed from one record to another."""
    old, new = ({row[_ID]: row for row in record.tolist()} for record in (before, now))
    kept = [(old[key], new[key]) for key in new if key in old]
    added, removed = len(new) - len(kept), len(old) - len(kept)
    return DataChange(
        added=added,
        removed=removed,
        renamed=sum(a[_NAME] != b[_NAME] for a, b in kept),
        reboxed=sum(a[_BOXES] != b[_BOXES] for a, b in kept),
        moved=0 if added or removed else sum(a != b for a, b in zip(old, new, strict=True)),
        kept=sum(a[_NAME] == b[_NAME] or a[_BOXES] == b[_BOXES] for a, b in kept),
    )


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _checksum(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)
