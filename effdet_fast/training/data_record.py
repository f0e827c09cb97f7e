"""What a checkpoint remembers of the images it was trained on, and what has changed in them when the run is resumed."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from effdet_fast.data import CocoDetection

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
