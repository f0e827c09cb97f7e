"""A trained detector for pictures: paths, PIL images or arrays in, boxes in original pixels out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, overload

import numpy as np
import torch
from PIL import Image

from effdet_fast.data import Placement, normalize
from effdet_fast.data.image_io import as_picture, open_image
from effdet_fast.data.placement import EXACT_GAP, Size, blank_input
from effdet_fast.device import autocast
from effdet_fast.drawing import class_color, draw_boxes
from effdet_fast.evaluation import ImageResult, coco_results, image_results, letterbox_sizes
from effdet_fast.evaluation.trained_model import TrainedModel, load_trained_model
from effdet_fast.models.detection_model import check_detection_options

Picture: TypeAlias = "str | os.PathLike[str] | Image.Image | np.ndarray"


@dataclass(frozen=True)
class ImageDetections:
    """What was found on one image, by descending score.

    Attributes:
        boxes: float32 [n, 4] xyxy in pixels of the upright picture, clipped to it.
        scores: float32 [n] in 0..1.
        labels: int64 [n], the model's 0-based classes.
        category_ids: int64 [n], ids of the annotations file it was trained on.
        class_names: n names.
        size: (height, width) of the picture.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    category_ids: np.ndarray
    class_names: list[str]
    size: Size

    def __len__(self) -> int:
        return len(self.boxes)

    def to_coco(self, image_id: int | str) -> list[dict[str, Any]]:
        """COCO results: `image_id`, `category_id`, `bbox` xywh, `score`."""
        result = ImageResult(self.boxes.astype(np.float64), self.scores.astype(np.float64), np.arange(len(self)))
        return coco_results([result], [image_id], self.category_ids.tolist())

    def draw(self, image: Picture) -> Image.Image:
        """A copy of `image` (the one that was predicted) with the boxes, names and scores on it."""
        picture = open_image(image)[0] if isinstance(image, str | os.PathLike) else as_picture(image)
        texts = [f"{name} {score:.2f}" for name, score in zip(self.class_names, self.scores, strict=True)]
        return draw_boxes(picture, self.boxes, texts, [class_color(int(label)) for label in self.labels])


class Detector:
    """Finds the objects of a trained model on pictures.

    Args:
        trained: what `load_trained_model` gave; `Detector.from_checkpoint` is the short way.
    """

    def __init__(self, trained: TrainedModel) -> None:
        self.model = trained.model
        self.class_names = trained.class_names
        self.category_ids = trained.category_ids
        self.image_size = trained.image_size
        self.mean, self.std = trained.mean, trained.std
        self.depth = trained.depth
        self.device = trained.device

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str],
        device: torch.device | str | None = None,
        image_size: int | tuple[int, int] | None = None,
    ) -> Detector:
        """Reads a `best.pt` or `last.pt`; see `load_trained_model` for the arguments and errors."""
        return cls(load_trained_model(path, device, image_size))

    @overload
    def predict(
        self,
        images: Picture,
        *,
        score_threshold: float | None = ...,
        iou_threshold: float | None = ...,
        max_detections: int = ...,
        batch_size: int = ...,
        amp: str | torch.dtype | None = ...,
    ) -> ImageDetections: ...

    @overload
    def predict(
        self,
        images: list[Picture] | tuple[Picture, ...],
        *,
        score_threshold: float | None = ...,
        iou_threshold: float | None = ...,
        max_detections: int = ...,
        batch_size: int = ...,
        amp: str | torch.dtype | None = ...,
    ) -> list[ImageDetections]: ...

    def predict(
        self,
        images: Picture | list[Picture] | tuple[Picture, ...],
        *,
        score_threshold: float | None = 0.3,
        iou_threshold: float | None = None,
        max_detections: int = 100,
        batch_size: int = 8,
        amp: str | torch.dtype | None = None,
    ) -> ImageDetections | list[ImageDetections]:
        """Detections of one picture, or of each of a list.

        Files and PIL images are turned upright by their EXIF orientation first, and boxes are in pixels of the upright
        picture. Any mode of PIL image will do; arrays are uint8 RGB [H, W, 3] or gray [H, W].

        Args:
            images: a path, PIL image or array, or a list of them.
            score_threshold: lower scores are left out; None takes the model's own, which of EfficientDets keeps all.
            iou_threshold: of the per-class non-maximum suppression; None takes the model's own.
            max_detections: per image.
            batch_size: images that go through the model at once.
            amp: None, "bf16" or "fp16".

        Raises:
            FileNotFoundError, ValueError: of a file, naming it; or a bad array shape or option.
            TypeError: not a picture.
        """
        check_detection_options("predict", score_threshold, iou_threshold, max_detections)
        if batch_size < 1:
            raise ValueError(f"predict: batch_size must be >= 1, got {batch_size}")
        many = isinstance(images, list | tuple)
        pictures: Sequence[Any] = images if isinstance(images, list | tuple) else [images]
        found: list[ImageDetections] = []
        for start in range(0, len(pictures), batch_size):
            inputs = [self.prepare(picture) for picture in pictures[start : start + batch_size]]
            found.extend(self.detect(inputs, score_threshold, iou_threshold, max_detections, amp))
        return found if many else found[0]

    def prepare(self, image: Picture, annotated_size: Size | None = None) -> tuple[np.ndarray, Size]:
        """The model's input for a picture (letterboxed uint8 [H, W, 3]), and the picture's (height, width)."""
        if isinstance(image, str | os.PathLike):
            picture, size = open_image(os.fspath(image), annotated_size, self._decode_size, self.depth)
        else:
            picture = as_picture(image, self.depth)
            size = (picture.height, picture.width)
        out = blank_input(self.image_size, self.mean)
        Placement.letterbox(size, self.image_size).render(picture, out, EXACT_GAP)
        return out, size

    def detect(
        self,
        inputs: Sequence[tuple[np.ndarray, Size]],
        score_threshold: float | None = 0.3,
        iou_threshold: float | None = None,
        max_detections: int = 100,
        amp: str | torch.dtype | None = None,
    ) -> list[ImageDetections]:
        """Detections of a batch of what `prepare` gave; the options are `predict`'s."""
        sizes = [size for _, size in inputs]
        pixels = torch.from_numpy(np.stack([array for array, _ in inputs])).permute(0, 3, 1, 2)
        with torch.inference_mode():
            normalized = normalize(pixels.to(self.device), self.mean, self.std)
            with autocast(self.device, amp):
                outputs = self.model(normalized)
            detections = self.model.detect(
                outputs,
                score_threshold=score_threshold,
                iou_threshold=iou_threshold,
                max_detections=max_detections,
                clip_sizes=letterbox_sizes(sizes, self.image_size).to(self.device),
            )
        on_cpu = type(detections)(*(t.cpu() for t in detections))
        return [self._named(r, s) for r, s in zip(image_results(on_cpu, sizes, self.image_size), sizes, strict=True)]

    def _decode_size(self, size: Size) -> Size:
        return Placement.letterbox(size, self.image_size).decode_size(EXACT_GAP)

    def _named(self, result: ImageResult, size: Size) -> ImageDetections:
        return ImageDetections(
            boxes=result.boxes.astype(np.float32),
            scores=result.scores.astype(np.float32),
            labels=result.labels,
            category_ids=np.array(self.category_ids, dtype=np.int64)[result.labels],
            class_names=[self.class_names[label] for label in result.labels],
            size=size,
        )
