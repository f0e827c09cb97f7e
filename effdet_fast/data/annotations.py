"""Reading and checking a COCO annotations file into flat NumPy arrays.

Arrays rather than dicts: forked loader workers touch the reference count of every Python object they look at, which
copies the pages they lie on; with a large file of dicts each worker ends up with a copy of its own.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from effdet_fast.data.string_array import StringArray

# COCO's own boxes overshoot the border by rounding errors of this size; beyond it somebody should know.
CLIP_TOLERANCE = 0.1
SHOWN = 5


@dataclass
class CocoAnnotations:
    """A checked annotations file. Images are in the file's order, annotations sorted by image.

    Attributes:
        image_ids: int64 [I]; counted from 1 where the file's own are strings.
        own_ids: I ids as the file has them, all integers or all strings.
        file_names: I names relative to the images folder.
        sizes: int64 [I, 2] (height, width) as the file says; -1 where it does not.
        category_ids: ids by label: label k is category `category_ids[k]`.
        class_names: names by label.
        file_category_ids: sorted ids of the categories the file itself declares.
        bbox: float64 [N, 4] xywh, exactly as in the file.
        area: float64 [N], the file's, or width times height.
        labels: int64 [N].
        crowd: bool [N].
        annotation_ids: int64 [N]; -1 where the file gives none.
        trainable: bool [N]: not crowd, and something is left of the box inside its image. Settled by `check_boxes`.
        first: int64 [I + 1]: image i owns annotations first[i] to first[i + 1].
    """

    path: str
    image_ids: np.ndarray
    own_ids: np.ndarray | StringArray
    file_names: StringArray
    sizes: np.ndarray
    category_ids: list[int]
    class_names: list[str]
    file_category_ids: list[int]
    bbox: np.ndarray
    area: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    annotation_ids: np.ndarray
    trainable: np.ndarray
    first: np.ndarray

    def own_id(self, image_id: int) -> int | str:
        """The file's own id of an image."""
        return self.own_ids[image_id - 1] if isinstance(self.own_ids, StringArray) else image_id


class Findings:
    """Counts what was wrong by kind and keeps the first few names of each."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.examples: dict[str, list[str]] = {}

    def add(self, kind: str, name: str) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        examples = self.examples.setdefault(kind, [])
        if len(examples) < SHOWN:
            examples.append(name)

    def __bool__(self) -> bool:
        return bool(self.counts)

    def text(self) -> str:
        parts = []
        for kind, count in self.counts.items():
            more = ", ..." if count > SHOWN else ""
            parts.append(f"{count} {kind} ({', '.join(self.examples[kind])}{more})")
        return "; ".join(parts)


def read_annotations(path: str | os.PathLike[str], category_ids: Sequence[int] | None = None) -> CocoAnnotations:
    """Reads a COCO detection file.

    Args:
        path: the JSON file. `annotations` may be missing, as in COCO's test files.
        category_ids: the id of each label; None takes the file's own, sorted.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not COCO detection JSON, or ids are duplicate or unknown; names the file and the entry.
    """
    path = os.fspath(path)
    data = _load_json(path)
    images, annotations, categories = (
        _list_of_dicts(path, data, key, key == "annotations") for key in ("images", "annotations", "categories")
    )
    if not images:
        raise ValueError(f"{path}: holds no images")
    names = _category_names(path, categories)
    if category_ids is None and _only_groups(categories, annotations):
        warnings.warn(
            f"{path}: category 0 ({names.pop(0)!r}) groups the others and has no box; it is left out", stacklevel=3
        )
    file_ids = sorted(names)
    ids = file_ids if category_ids is None else [int(c) for c in category_ids]
    if len(set(ids)) != len(ids):
        raise ValueError(f"{path}: category_ids given more than once: {ids}")
    own_ids, file_names, sizes = _images(path, images)
    fields = _annotations(path, annotations, own_ids, names, ids)
    image_ids = np.arange(1, len(own_ids) + 1) if isinstance(own_ids, StringArray) else own_ids
    return CocoAnnotations(
        path, image_ids, own_ids, file_names, sizes, ids, [names.get(c, str(c)) for c in ids], file_ids, **fields
    )


def check_names(annotations: CocoAnnotations, images_dir: str) -> None:
    """Makes `file_names` those of files: with / for the backslashes of Windows, unless a file has these in its name.

    Raises:
        ValueError: a name that leads out of the images folder.
    """
    names = list(annotations.file_names)
    for i, name in enumerate(names):
        portable = name.replace("\\", "/")
        if ".." in portable.split("/") or portable.startswith("/") or portable[1:3] == ":/":
            raise ValueError(f"{annotations.path}: file name {name} is absolute or leads out of the images folder")
        if portable != name and not os.path.exists(os.path.join(images_dir, name)):
            names[i] = portable
    annotations.file_names = StringArray(names)


def check_boxes(annotations: CocoAnnotations) -> None:
    """Settles `trainable` from the image sizes, with one counted warning about boxes that are clipped or left out.

    Raises:
        ValueError: boxes that are not in pixels.
    """
    found = Findings()
    sizes = np.repeat(annotations.sizes, np.diff(annotations.first), axis=0).astype(np.float64)
    x, y, w, h = annotations.bbox.T
    finite = np.isfinite(annotations.bbox).all(axis=1)
    _refuse_normalized(annotations.path, annotations.bbox[finite], annotations.sizes)
    with np.errstate(invalid="ignore", over="ignore"):
        empty = finite & ((w <= 0) | (h <= 0))
        inside_w = np.minimum(x + w, sizes[:, 1]) - np.maximum(x, 0)
        inside_h = np.minimum(y + h, sizes[:, 0]) - np.maximum(y, 0)
        outside = finite & ~empty & ~((inside_w > 0) & (inside_h > 0))
        over = np.maximum.reduce([-x, -y, x + w - sizes[:, 1], y + h - sizes[:, 0]])
        clipped = finite & ~empty & ~outside & (over > CLIP_TOLERANCE)
    kinds = (
        ("with a box that is not finite, left out", ~finite),
        ("with a box without width or height, left out of training", empty),
        ("with a box outside the image, left out of training", outside),
        ("with a box partly outside the image, clipped", clipped),
    )
    for kind, mask in kinds:
        for i in np.flatnonzero(mask):
            found.add(kind, _annotation_name(annotations, int(i)))
    annotations.trainable = finite & ~empty & ~outside & ~annotations.crowd
    if found:
        warnings.warn(f"{annotations.path}: annotations {found.text()}", stacklevel=3)


def _refuse_normalized(path: str, bbox: np.ndarray, sizes: np.ndarray) -> None:
    x, y, w, h = bbox.T
    within = (x >= 0) & (y >= 0) & (x + w <= 1.001) & (y + h <= 1.001)
    if len(bbox) and within.all() and (bbox % 1 != 0).any() and (w * h > 0).any() and sizes.min() > 1:
        raise ValueError(
            f"{path}: all {len(bbox)} boxes lie between 0 and 1, as if they were shares of the picture; "
            "bbox must be [x, y, width, height] in pixels"
        )


def _annotation_name(annotations: CocoAnnotations, i: int) -> str:
    image = int(np.searchsorted(annotations.first, i, side="right")) - 1
    box = [float(v) for v in annotations.bbox[i]]
    key = annotations.annotation_ids[i]
    return f"annotation {f'id {key}' if key >= 0 else 'without id'} of {annotations.file_names[image]}: {box}"


def _load_json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            data = json.load(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such annotations file") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: is a folder, not an annotations file") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        hint = "; a list is a results file, not annotations" if isinstance(data, list) else ""
        raise ValueError(f"{path}: must hold an object with images, annotations and categories{hint}")
    return data


def _list_of_dicts(path: str, data: dict[str, Any], key: str, optional: bool) -> list[dict[str, Any]]:
    if key not in data and optional:
        return []
    rows = data.get(key)
    if not isinstance(rows, list):
        raise ValueError(f"{path}: '{key}' must be a list, got {type(rows).__name__}")
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: {key}[{i}] must be an object, got {row!r:.80}")
    return rows


def _integer(value: Any) -> int | None:
    """The integer that `value` stands for, None if it is none. Writers that go through pandas turn ids into 3.0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, float) and not value.is_integer():
        return None
    return int(value) if -(2**63) <= value < 2**63 else None


def _image_id(value: Any) -> int | str | None:
    return value if isinstance(value, str) and value else _integer(value)


def _category_names(path: str, categories: list[dict[str, Any]]) -> dict[int, str]:
    names: dict[int, str] = {}
    for i, row in enumerate(categories):
        key = _integer(row.get("id"))
        if key is None:
            raise ValueError(f"{path}: categories[{i}] needs an integer id, got {row.get('id')!r:.80}")
        if key in names:
            raise ValueError(f"{path}: category id {key} is used twice, by {names[key]!r} and {row.get('name')!r:.80}")
        names[key] = str(row.get("name", key))
    return names


def _only_groups(categories: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> bool:
    """Whether category 0 is what Roboflow puts before the classes: without a box, and the supercategory of all others."""
    group = next((row for row in categories if _integer(row.get("id")) == 0), {})
    others = [row for row in categories if row is not group]
    return (
        isinstance(group.get("name"), str)
        and bool(others)
        and all(row.get("supercategory") == group.get("name") for row in others)
        and not any(_integer(row.get("category_id")) == 0 for row in annotations)
    )


def _images(path: str, images: list[dict[str, Any]]) -> tuple[np.ndarray | StringArray, StringArray, np.ndarray]:
    seen: dict[int | str, str] = {}
    files: set[str] = set()
    repeated = Findings()
    names: list[str] = []
    sizes = np.full((len(images), 2), -1, dtype=np.int64)
    for i, row in enumerate(images):
        name = row.get("file_name")
        if not isinstance(name, str) or not name:
            raise ValueError(f"{path}: images[{i}] (id {row.get('id')!r:.80}) needs a file_name, got {name!r:.80}")
        key = _image_id(row.get("id"))
        if key is None:
            raise ValueError(f"{path}: image {name} needs an id, an integer or a string, got {row.get('id')!r:.80}")
        if seen and isinstance(key, str) != isinstance(next(iter(seen)), str):
            raise ValueError(
                f"{path}: image ids must be all integers or all strings, got {next(iter(seen))!r} and {key!r:.80}"
            )
        if key in seen:
            raise ValueError(f"{path}: image id {key} is used twice, by {seen[key]} and {name}")
        if name in files:
            repeated.add("file names listed more than once", name)
        for column, field in enumerate(("height", "width")):
            value = row.get(field)
            if value is None:
                continue
            number = _integer(value)
            if number is None or number < 1:
                raise ValueError(f"{path}: image {name} (id {key}) has {field} {value!r:.80}")
            sizes[i, column] = number
        seen[key] = name
        files.add(name)
        names.append(name)
    if repeated:
        warnings.warn(f"{path}: {repeated.text()}", stacklevel=4)
    strings = [key for key in seen if isinstance(key, str)]
    own_ids = StringArray(strings) if strings else np.array(list(seen), dtype=np.int64)
    return own_ids, StringArray(names), sizes


def _annotations(
    path: str,
    rows: list[dict[str, Any]],
    own_ids: np.ndarray | StringArray,
    names: dict[int, str],
    category_ids: list[int],
) -> dict[str, np.ndarray]:
    n = len(rows)
    image_of = {key: i for i, key in enumerate(own_ids.tolist())}
    label_of = {key: k for k, key in enumerate(category_ids)}
    bbox, area = np.empty((n, 4)), np.empty(n)
    image_index, labels, ids = (np.empty(n, dtype=np.int64) for _ in range(3))
    crowd = np.zeros(n, dtype=bool)
    repeated = Findings()
    seen: set[int] = set()
    for i, row in enumerate(rows):
        key = _integer(row.get("id"))
        what = f"annotation id {row['id']!r:.80}" if "id" in row else f"annotations[{i}] (without id)"
        image = _image_id(row.get("image_id"))
        if image not in image_of:
            raise ValueError(f"{path}: {what} belongs to an unknown image: image_id {row.get('image_id')!r:.80}")
        category = _integer(row.get("category_id"))
        if category not in label_of:
            raise ValueError(f"{path}: {what} (image_id {image}) {_category_problem(row, names, category_ids)}")
        if key is not None and key in seen:
            repeated.add("annotation ids used more than once", str(key))
        if key is not None:
            seen.add(key)
        image_index[i], labels[i], ids[i] = image_of[image], label_of[category], -1 if key is None else key
        bbox[i] = _box(path, what, row.get("bbox"))
        crowd[i] = _crowd(path, what, row.get("iscrowd", 0))
        area[i] = _area(path, what, row.get("area"), bbox[i])
    if repeated:
        warnings.warn(f"{path}: {repeated.text()}", stacklevel=4)
    order = np.argsort(image_index, kind="stable")
    first = np.searchsorted(image_index[order], np.arange(len(own_ids) + 1))
    return {
        "bbox": bbox[order],
        "area": area[order],
        "labels": labels[order],
        "crowd": crowd[order],
        "annotation_ids": ids[order],
        "trainable": ~crowd[order],
        "first": first,
    }


def _category_problem(row: dict[str, Any], names: dict[int, str], category_ids: list[int]) -> str:
    value = row.get("category_id")
    key = _integer(value)
    if key is not None and key in names:
        return f"has category {key} ({names[key]!r}), which is not among the model's ids: {category_ids}"
    return f"has an unknown category: category_id {value!r:.80}; the file's categories are {sorted(names)}"


def _box(path: str, what: str, box: Any) -> list[float]:
    ok = isinstance(box, list) and len(box) == 4
    if not ok or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in box):
        raise ValueError(f"{path}: {what}: bbox must be four numbers [x, y, width, height], got {box!r:.80}")
    return [_float(v) for v in box]


def _float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _crowd(path: str, what: str, value: Any) -> bool:
    if value not in (0, 1):
        raise ValueError(f"{path}: {what}: iscrowd must be 0 or 1, got {value!r:.80}")
    return bool(value)


def _area(path: str, what: str, value: Any, box: np.ndarray) -> float:
    if value is None:
        return float(box[2] * box[3])
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{path}: {what}: area must be a number, got {value!r:.80}")
    number = _float(value)
    return number if math.isfinite(number) else float(box[2] * box[3])
