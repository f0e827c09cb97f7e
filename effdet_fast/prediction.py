"""Detection on a picture or a folder, with drawn pictures and a COCO results file. `effdet-fast predict` calls this."""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from effdet_fast.data.annotations import SHOWN, check_names, read_annotations
from effdet_fast.data.image_io import IMAGE_SUFFIXES, open_image
from effdet_fast.data.placement import Size
from effdet_fast.detector import Detector, ImageDetections
from effdet_fast.files import (
    check_writable,
    refuse_existing,
    refuse_links,
    write_atomically,
    write_json,
)
from effdet_fast.models.detection_model import check_detection_options

DETECTIONS_FILE = "detections.json"
_DRAWN_AS_THEY_ARE = (".jpg", ".jpeg", ".png")
Prepared = tuple[np.ndarray, Size]


@dataclass(frozen=True)
class _Source:
    path: str
    name: str  # relative to the images folder
    image_id: int | str
    annotated_size: Size | None
    target: str  # where the drawn picture goes


def predict(
    checkpoint: str | os.PathLike[str] | Detector,
    images: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    annotations: str | os.PathLike[str] | None = None,
    score_threshold: float | None = 0.3,
    iou_threshold: float | None = None,
    max_detections: int = 100,
    batch_size: int = 8,
    image_size: int | tuple[int, int] | None = None,
    workers: int = 4,
    device: torch.device | str | None = None,
    amp: str | torch.dtype | None = None,
    draw: bool = True,
    overwrite: bool = False,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Detect the objects on a picture or a folder, and write `detections.json` and the pictures with boxes on them.

    Pictures are turned upright by their EXIF orientation. Boxes, in the file and on the pictures, are in pixels of the upright
    picture. A drawn JPEG or PNG keeps its name; others get ".png" appended.

    Image ids are those of `annotations`, if given. Else they are the file names, if all of those are numbers, as COCO's are. Else
    they count from 1 in the order of the names, and each result names its file under `file_name`.

    A warning counts and names the pictures of a folder that cannot be decoded.

    Args:
        checkpoint: a `best.pt` or `last.pt`, or a `Detector`.
        images: one file, or a folder, whose subfolders are not read.
        output: folder to write to, outside of `images`; made if missing. Only `overwrite` replaces files in it, and nothing
            replaces the pictures that are read.
        annotations: COCO file that lists the images to go through, relative to the folder `images`.
        score_threshold: see `Detector.predict`.
        iou_threshold: see `Detector.predict`.
        max_detections: see `Detector.predict`.
        batch_size: pictures that go through the model at once.
        image_size: input side or (height, width) in pixels, if other than the one trained at.
        workers: threads that read and draw.
        device: None takes the GPU if there is one.
        amp: precision of the forward pass: None (float32), "bf16" or "fp16".
        draw: write the drawn pictures too.
        overwrite: replace the files of an earlier call.
        progress: show a progress bar.

    Returns:
        COCO results, the content of `detections.json`.

    Raises:
        FileExistsError: a file to be written exists, or would replace a picture that is read.
        FileNotFoundError: there is no such checkpoint, picture or folder.
        ValueError: there are no pictures, none of them can be decoded, or an option is out of range.

    Example:
        ```python
        results = effdet_fast.predict("runs/exp1/best.pt", "photographs", "found", score_threshold=0.3)
        ```
    """
    if workers < 1 or batch_size < 1:
        raise ValueError(f"predict: workers and batch_size must be >= 1, got {workers}, {batch_size}")
    check_detection_options("predict", score_threshold, iou_threshold, max_detections)
    output = os.fspath(output)
    sources, by_position = _sources(os.fspath(images), output, None if annotations is None else os.fspath(annotations))
    results_file = os.path.join(output, DETECTIONS_FILE)
    _check_targets(sources, output, results_file, draw, overwrite)
    if os.path.isdir(images) and _is_inside(output, os.fspath(images)):
        raise ValueError(f"predict: output {output} lies inside the images folder {images}; choose another output")
    check_writable(results_file)
    if isinstance(checkpoint, Detector):
        detector = checkpoint
    else:
        detector = Detector.from_checkpoint(checkpoint, device, image_size)
    options: dict[str, Any] = {
        "score_threshold": score_threshold,
        "iou_threshold": iou_threshold,
        "max_detections": max_detections,
        "amp": amp,
    }
    rows: list[dict[str, Any]] = []
    broken: list[str] = []
    drawings: deque[Future] = deque()
    bar = tqdm(total=len(sources), desc="predicting", disable=not progress, leave=False)
    with ThreadPoolExecutor(workers) as pool, bar:
        for batch, prepared, errors in _read_ahead(pool, detector, sources, batch_size):
            broken.extend(errors)
            found = detector.detect(prepared, **options) if prepared else []
            for source, detections in zip(batch, found, strict=True):
                extra = {"file_name": source.name} if by_position else {}
                rows.extend({**row, **extra} for row in detections.to_coco(source.image_id))
                if draw:
                    drawings.append(pool.submit(_write_picture, source, detections, detector.depth))
            # Without a bound, drawing slower than detecting would pile up.
            while len(drawings) > 4 * batch_size:
                drawings.popleft().result()
            bar.update(len(batch) + len(errors))
        while drawings:
            drawings.popleft().result()
    if broken:
        listed = "\n  ".join(broken[:SHOWN]) + (
            f"\n  ... and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
        )
        if len(broken) == len(sources):
            raise ValueError(f"predict: no picture could be used:\n  {listed}")
        warnings.warn(f"predict: {len(broken)} of {len(sources)} pictures were left out:\n  {listed}", stacklevel=2)
    write_json(results_file, rows)
    return rows


def _sources(images: str, output: str, annotations: str | None) -> tuple[list[_Source], bool]:
    if not os.path.exists(images):
        raise FileNotFoundError(f"{images}: no such picture or folder")
    if annotations is not None:
        return _annotated_sources(images, output, annotations), False
    if os.path.isdir(images):
        folder = images
        names = sorted(
            n
            for n in os.listdir(images)
            if n.lower().endswith(IMAGE_SUFFIXES) and os.path.isfile(os.path.join(images, n))
        )
        if not names:
            raise ValueError(f"{images}: holds no pictures ({', '.join(IMAGE_SUFFIXES)})")
    else:
        folder, name = os.path.split(images)
        names = [name]
    stems = [os.path.splitext(name)[0] for name in names]
    numbered = all(s.isascii() and s.isdigit() and len(s) < 19 for s in stems) and len({int(s) for s in stems}) == len(
        stems
    )
    ids = [int(s) for s in stems] if numbered else range(1, len(names) + 1)
    pairs = zip(names, ids, strict=True)
    return [_Source(os.path.join(folder, n), n, i, None, _target(output, n)) for n, i in pairs], not numbered


def _annotated_sources(images: str, output: str, annotations: str) -> list[_Source]:
    if not os.path.isdir(images):
        raise ValueError(f"{images}: with annotations, images must be the folder that their file names start from")
    listed = read_annotations(annotations)
    check_names(listed, images)
    sources = []
    for image_id, name, (height, width) in zip(
        listed.own_ids.tolist(),
        list(listed.file_names),
        listed.sizes.tolist(),
        strict=True,
    ):
        size = (height, width) if height > 0 and width > 0 else None
        sources.append(_Source(os.path.join(images, name), name, image_id, size, _target(output, name)))
    return sources


def _is_inside(path: str, folder: str) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _target(output: str, name: str) -> str:
    return os.path.join(output, name if name.lower().endswith(_DRAWN_AS_THEY_ARE) else f"{name}.png")


def _check_targets(sources: list[_Source], output: str, results_file: str, draw: bool, overwrite: bool) -> None:
    if os.path.exists(output) and not os.path.isdir(output):
        raise FileExistsError(f"{output}: is a file, the output must be a folder")
    targets = [s.target for s in sources] if draw else []
    inputs = {os.path.realpath(s.path) for s in sources}
    seen: set[str] = set()
    for target in targets:
        if os.path.realpath(target) in inputs:
            raise FileExistsError(f"{target}: is a picture to be read and will not be replaced; choose another output")
        if target in seen:
            raise ValueError(f"{target}: two pictures would be written there; rename one of them")
        seen.add(target)
    refuse_links(targets, output)
    refuse_existing([results_file, *targets], overwrite)


def _read_ahead(
    pool: ThreadPoolExecutor, detector: Detector, sources: list[_Source], batch_size: int
) -> Iterator[tuple[list[_Source], list[Prepared], list[str]]]:
    """Batches of sources with the model's inputs, and what was said of those that cannot be read."""

    def read(source: _Source) -> Prepared | str:
        try:
            return detector.prepare(source.path, source.annotated_size)
        except (FileNotFoundError, ValueError) as error:
            return str(error)

    batches = [sources[start : start + batch_size] for start in range(0, len(sources), batch_size)]
    reading: deque[list[Future]] = deque()
    for n, batch in enumerate(batches):
        while len(reading) < 3 and n + len(reading) < len(batches):
            reading.append([pool.submit(read, source) for source in batches[n + len(reading)]])
        inputs = [future.result() for future in reading.popleft()]
        good = [(s, p) for s, p in zip(batch, inputs, strict=True) if not isinstance(p, str)]
        yield [s for s, _ in good], [p for _, p in good], [p for p in inputs if isinstance(p, str)]


def _write_picture(source: _Source, detections: ImageDetections, depth: int | None) -> None:
    picture: Image.Image = detections.draw(open_image(source.path, source.annotated_size, depth=depth)[0])
    # Full chroma: halved, it would smear the thin lines.
    options: dict[str, Any] = (
        {"quality": 92, "subsampling": 0} if source.target.lower().endswith((".jpg", ".jpeg")) else {}
    )
    write_atomically(source.target, lambda temporary: picture.save(temporary, **options))
