"""A COCO detection data set on disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from effdet_fast.data.annotations import SHOWN, check_boxes, check_names, read_annotations
from effdet_fast.data.image_io import DEPTHS, Size, depth_of, largest_value, open_image, read_header


class CocoDetection(Dataset):
    """The images and boxes of a COCO annotations file, which is checked as a whole when the data set is made.

    Label k (0-based, without gaps) stands for category `category_ids[k]` of the file. Images without boxes stay.
    Crowd boxes are kept apart from those to train on. Pictures are turned upright by their EXIF orientation, unless the sizes in
    the file show that its boxes belong to the stored pixels.

    One counted warning names the boxes that are left out of training (not finite, empty or outside the image) and those that
    are clipped (partly outside).

    Indexing gives a sample, a dict: `image` uint8 [H, W, 3] RGB, `boxes` float32 [n, 4] xyxy in pixels, `labels` int64 [n],
    `crowd_boxes` float32 [k, 4], `crowd_labels` int64 [k], `image_id`, `size` (height, width), `file_name`.

    Args:
        images_dir: folder that the file names are relative to.
        annotations_file: COCO JSON.
        category_ids: the category of each label, as a model already trained has them; None takes the file's, sorted.
        check_images: read every picture's header now. Without it only missing sizes are read.
        depth: bits of the values of gray pictures of more than 8 bits: 8, 10, 12, 14 or 16; the upper 8 are kept. "auto"
            decodes all of them now and takes the smallest depth that fits their largest value. None decides for each picture.

    Attributes:
        depth: what "auto" found, or the argument; None too where no picture is deep.
        deepest: the largest value that "auto" found.

    Raises:
        FileNotFoundError: the folder or the annotations file is missing.
        ValueError: `depth` is none of these, a picture is missing, unreadable or of another size than annotated, an image or
            category id is duplicate or unknown, or a box is malformed. The message names the file and the annotation or image.
            What only decoding shows, such as a truncated picture, is raised by indexing.
    """

    def __init__(
        self,
        images_dir: str | os.PathLike[str],
        annotations_file: str | os.PathLike[str],
        *,
        category_ids: Sequence[int] | None = None,
        check_images: bool = True,
        depth: int | str | None = None,
    ) -> None:
        if depth is not None and depth not in ("auto", *DEPTHS):
            raise ValueError(f"CocoDetection: depth must be 'auto', None or one of {list(DEPTHS)}, got {depth!r}")
        self.images_dir = os.fspath(images_dir)
        self.annotations_file = os.fspath(annotations_file)
        if not os.path.isdir(self.images_dir):
            raise FileNotFoundError(f"{self.images_dir}: no such images folder")
        self.annotations = read_annotations(annotations_file, category_ids)
        check_names(self.annotations, self.images_dir)
        deep = self._check_images(check_images or depth == "auto")
        check_boxes(self.annotations)
        self.deepest: int | None = None
        if depth == "auto":
            with ThreadPoolExecutor(min(16, max(1, len(deep)))) as pool:
                self.deepest = max(pool.map(largest_value, map(self.path, deep)), default=None)
            depth = None if self.deepest is None else depth_of(self.deepest)
        self.depth: int | None = depth  # type: ignore[assignment]

    @property
    def category_ids(self) -> list[int]:
        """Category id of each label."""
        return list(self.annotations.category_ids)

    @property
    def class_names(self) -> list[str]:
        """Name of each label."""
        return list(self.annotations.class_names)

    @property
    def image_ids(self) -> list[int] | list[str]:
        """Id of each image, as the file has it."""
        return self.annotations.own_ids.tolist()

    @property
    def file_names(self) -> list[str]:
        """File name of each image, relative to the images folder."""
        return list(self.annotations.file_names)

    def __len__(self) -> int:
        return len(self.annotations.image_ids)

    def size(self, i: int) -> Size:
        """Return the (height, width) of image i in pixels."""
        height, width = self.annotations.sizes[i]
        return int(height), int(width)

    def differing_names(self, names: Sequence[str]) -> list[str]:
        """Describe each category that the file names differently.

        Equal ids with other names mean two files that number their categories differently.

        Args:
            names: the expected name of each label.

        Returns:
            One phrase for each difference.
        """
        declared = set(self.annotations.file_category_ids)
        rows = zip(self.category_ids, self.class_names, names, strict=True)
        return [f"{key} is {here!r}, was {there!r}" for key, here, there in rows if key in declared and here != there]

    def path(self, i: int) -> str:
        """Return the path of image i."""
        return os.path.join(self.images_dir, self.annotations.file_names[i])

    def open(self, i: int, wanted_size: Size | None = None) -> Image.Image:
        """Decode image i to an upright RGB picture.

        Args:
            i: index of the image.
            wanted_size: (height, width) that is enough: a JPEG may be decoded at a reduced size that is no smaller; see
                `open_image`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file cannot be decoded, or has another size than annotated.
        """
        return open_image(self.path(i), self.size(i), wanted_size, self.depth)[0]

    def boxes(self, i: int, crowd: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Return the boxes and labels of image i.

        Args:
            i: index of the image.
            crowd: return the crowd boxes instead of those to train on.

        Returns:
            Boxes, float64 [n, 4] xyxy in pixels, clipped to the image; and labels, int64 [n].
        """
        a = self.annotations
        owned = slice(a.first[i], a.first[i + 1])
        chosen = a.crowd[owned] & np.isfinite(a.bbox[owned]).all(axis=1) if crowd else a.trainable[owned]
        xywh = a.bbox[owned][chosen]
        height, width = self.size(i)
        corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
        return np.clip(corners, 0, np.array([width, height] * 2)), a.labels[owned][chosen]

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Return sample i, whose keys the class lists."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"CocoDetection: index {i} is out of range for {len(self)} images")
        i = int(i) % len(self)
        boxes, labels = self.boxes(i)
        crowd_boxes, crowd_labels = self.boxes(i, crowd=True)
        return {
            "image": np.array(self.open(i)),
            "boxes": boxes.astype(np.float32),
            "labels": labels,
            "crowd_boxes": crowd_boxes.astype(np.float32),
            "crowd_labels": crowd_labels,
            "image_id": self.annotations.own_id(int(self.annotations.image_ids[i])),
            "size": self.size(i),
            "file_name": self.annotations.file_names[i],
        }

    def _check_images(self, everything: bool) -> list[int]:
        """Read headers, of every picture or where the size is missing; return the indices of those that are deep."""
        deep: list[int] = []
        sizes = self.annotations.sizes
        without_size = set(np.flatnonzero((sizes < 0).any(axis=1)).tolist())

        def check(i: int) -> str | None:
            try:
                sizes[i], is_deep = read_header(self.path(i), None if i in without_size else self.size(i))
                if is_deep:
                    deep.append(i)
            except (FileNotFoundError, ValueError) as error:
                return str(error)
            return None

        wanted = [i for i in range(len(self)) if everything or i in without_size]
        # Reading headers is mostly waiting for the disk or the network.
        with ThreadPoolExecutor(min(16, max(1, len(wanted) // 64))) as pool:
            problems = [p for p in pool.map(check, wanted, chunksize=1) if p is not None]
        if problems:
            more = f"\n  ... and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
            listed = "\n  ".join(problems[:SHOWN])
            what = "picture" if len(problems) == 1 else "pictures"
            raise ValueError(f"{self.annotations_file}: {len(problems)} {what} cannot be used:\n  {listed}{more}")
        return sorted(deep)
