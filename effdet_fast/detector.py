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
    """The detections of one picture, by descending score.

    Attributes:
        boxes: float32 [n, 4] xyxy in pixels of the upright picture, clipped to it.
        scores: float32 [n] in 0..1.
        labels: int64 [n], 0-based class indices.
        category_ids: int64 [n], the classes' ids in the annotations file that the model was trained on.
        class_names: n names, one for each detection.
        size: (height, width) of the upright picture in pixels.
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
        """Convert to COCO results, a dict for each detection: `image_id`, `category_id`, `bbox` xywh in pixels, `score`."""
        result = ImageResult(self.boxes.astype(np.float64), self.scores.astype(np.float64), np.arange(len(self)))
        return coco_results([result], [image_id], self.category_ids.tolist())

    def draw(self, image: Picture) -> Image.Image:
        """Draw boxes, names and scores on a copy of `image`, which must be the picture they were found on."""
        picture = open_image(image)[0] if isinstance(image, str | os.PathLike) else as_picture(image)
        texts = [f"{name} {score:.2f}" for name, score in zip(self.class_names, self.scores, strict=True)]
        return draw_boxes(picture, self.boxes, texts, [class_color(int(label)) for label in self.labels])


class Detector:
    """A trained model that detects objects on pictures.

    Args:
        trained: what `load_trained_model` returned; `Detector.from_checkpoint` does both in one call.

    Attributes:
        model: the `DetectionModel`, in evaluation mode.
        class_names: name of each label.
        category_ids: id of each label in the annotations file that the model was trained on.
        image_size: (height, width) of the model's input in pixels.
        mean: RGB mean that inputs are normalized with, in 0..1.
        std: RGB standard deviation, likewise.
        depth: bits of the values of the gray training pictures of more than 8 bits; None if there were none.
        device: where the model is.

    Example:
        ```python
        detector = effdet_fast.Detector.from_checkpoint("runs/exp1/best.pt")
        found = detector.predict("photograph.jpg", score_threshold=0.3)
        print(found.boxes, found.scores, found.class_names)
        ```
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
        """Load a detector from the checkpoint of a training run.

        Args:
            path: a `best.pt` or `last.pt`, or a detector that `convert_checkpoint` wrote as "effdet_fast".
            device: None takes the GPU if there is one.
            image_size: input side or (height, width) in pixels, if other than the one trained at.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no checkpoint of this package, or contradicts itself.
        """
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
        """Detect the objects on one picture, or on each of a list.

        Files and PIL images are turned upright by their EXIF orientation first. Boxes are in pixels of the upright picture.

        Args:
            images: a path, a PIL image, an array, or a list of them. PIL images may be of any mode but "F"; arrays are uint8, RGB
                [H, W, 3] or gray [H, W].
            score_threshold: detections with a lower score are dropped; None takes the model's own threshold. An EfficientDet's
                keeps all.
            iou_threshold: of the per-class non-maximum suppression; None takes the model's own.
            max_detections: largest number of detections on a picture.
            batch_size: pictures that go through the model at once.
            amp: precision of the forward pass: None (float32), "bf16" or "fp16".

        Returns:
            The `ImageDetections` of the picture, or a list with those of each.

        Raises:
            FileNotFoundError: there is no such file.
            TypeError: an image is neither a path, a PIL image nor a uint8 array; or a threshold is not a number.
            ValueError: a file cannot be decoded (the message names it), an array has another shape, or an option is out of range.
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
        """Turn a picture into the model's input.

        Args:
            image: a path, a PIL image or an array, as for `predict`.
            annotated_size: (height, width) of the picture in an annotations file; see `open_image`. Used for a path only.

        Returns:
            The letterboxed picture, uint8 RGB [H, W, 3] of `image_size`; and the (height, width) of the upright picture.
        """
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
        """Detect the objects on a batch of prepared pictures.

        Args:
            inputs: what `prepare` returned for each picture.
            score_threshold: as for `predict`.
            iou_threshold: as for `predict`.
            max_detections: as for `predict`.
            amp: as for `predict`.

        Returns:
            The `ImageDetections` of each picture.
        """
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
