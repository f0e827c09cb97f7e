"""effdet's benches: what they do around the model, with their post-processing as one op for the whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effdet_fast.acceleration.effdet_labeler import swap_axes
from effdet_fast.acceleration.swap import Swap
from effdet_fast.ops import Detections, batched_nms_padded, decode_detections

# As effdet's `generate_detections` calls its two methods.
HARD_IOU, SOFT_IOU, SOFT_SIGMA, SOFT_SCORE = 0.5, 0.3, 0.5, 0.001


class DetBench(Swap):
    """What both benches share. Detections have no gradient."""

    family, replacement = "nms", "decode_detections"
    model: Any
    anchors: Any
    num_levels: int
    num_classes: int
    max_detection_points: int
    max_det_per_image: int
    soft_nms: bool

    def detect(
        self,
        class_out: Sequence[Tensor],
        box_out: Sequence[Tensor],
        img_scale: Tensor | None,
        img_size: Tensor | None,
    ) -> Tensor:
        """[B, max_det_per_image, 6]: x1, y1, x2, y2 in pixels of the original image, score, class from 1; rows of 0 pad."""
        anchors = self.anchors.boxes
        like = {"device": anchors.device, "dtype": torch.promote_types(anchors.dtype, torch.float32)}
        scale = None if img_scale is None else img_scale.to(**like).reshape(-1, 1)
        clip_sizes = None
        if scale is not None and img_size is not None:
            clip_sizes = (img_size.to(**like) / scale).flip(1)
        options: dict[str, Any] = {
            "num_classes": self.num_classes,
            "max_candidates": self.max_detection_points,
            "clip_sizes": clip_sizes,
        }
        outputs = class_out[: self.num_levels], box_out[: self.num_levels], swap_axes(anchors)
        if self.soft_nms:
            candidates = min(self.max_detection_points, len(anchors) * self.num_classes)
            every = decode_detections(*outputs, iou_threshold=float("inf"), max_detections=candidates, **options)
            found = soften(every, self.max_det_per_image)
        else:
            max_detections = self.max_det_per_image
            found = decode_detections(*outputs, iou_threshold=HARD_IOU, max_detections=max_detections, **options)
        boxes = found.boxes if scale is None else found.boxes * scale.unsqueeze(2)
        rows = torch.cat([boxes, found.scores.unsqueeze(2), (found.labels + 1).unsqueeze(2)], 2)
        return rows.to(like["dtype"])


def soften(every: Detections, max_detections: int) -> Detections:
    """Soft-NMS of all candidates as effdet does it, to the same overlaps.

    It keeps classes apart by moving each to a place of its own, which rounds its boxes. The best candidate stays in any case.
    """
    boxes = every.boxes
    shift = every.labels.to(boxes) * (boxes.amax((1, 2)) + 1).unsqueeze(1)
    one_class = torch.zeros_like(every.labels)
    options: dict[str, Any] = {"method": "gaussian", "sigma": SOFT_SIGMA, "max_detections": max_detections}
    found = batched_nms_padded(boxes + shift.unsqueeze(2), every.scores, one_class, SOFT_IOU, **options)
    kept = (found.indices >= 0) & (
        (found.scores > SOFT_SCORE) | (torch.arange(max_detections, device=boxes.device) == 0)
    )
    rows = found.indices.clamp(min=0)
    return Detections(
        torch.where(kept.unsqueeze(2), boxes.gather(1, rows.unsqueeze(2).expand(-1, -1, 4)), 0),
        torch.where(kept, found.scores, 0),
        torch.where(kept, every.labels.gather(1, rows), -1),
        torch.where(kept, every.indices.gather(1, rows), -1),
        kept.sum(1),
    )


class PredictBench(DetBench):
    """`DetBenchPredict`."""

    classes = ("effdet.DetBenchPredict",)

    def forward(self, x: Tensor, img_info: dict[str, Tensor] | None = None) -> Tensor:
        info = {"img_scale": None, "img_size": None} if img_info is None else img_info
        class_out, box_out = self.model(x)
        return self.detect(class_out, box_out, info["img_scale"], info["img_size"])


class TrainBench(DetBench):
    """`DetBenchTrain`."""

    classes = ("effdet.DetBenchTrain",)
    anchor_labeler: Any
    loss_fn: Any
    training: bool

    def forward(self, x: Tensor, target: dict[str, Any]) -> dict[str, Tensor]:
        class_out, box_out = self.model(x)
        if self.anchor_labeler is None:  # whoever loads the data has labeled the anchors
            per_level = (
                [target[f"{name}_{i}"] for i in range(self.num_levels)] for name in ("label_cls", "label_bbox")
            )
            targets = (*per_level, target["label_num_positives"])
        else:
            targets = self.anchor_labeler.batch_label_anchors(target["bbox"], target["cls"])
        loss, class_loss, box_loss = self.loss_fn(class_out, box_out, *targets)
        results = {"loss": loss, "class_loss": class_loss, "box_loss": box_loss}
        if not self.training:
            results["detections"] = self.detect(class_out, box_out, target["img_scale"], target["img_size"])
        return results
