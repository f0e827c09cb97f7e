"""What ONNX's operators make of the two steps of detection that are more than arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Stands in a traced graph for ONNX's NonMaxSuppression, whose result has a size that depends on the values.
_library = torch.library.Library("effdet_fast_export", "DEF")
_library.define("kept_by_nms(Tensor boxes, Tensor scores, float iou_threshold, int max_per_class) -> Tensor")
torch.library.register_fake(
    "effdet_fast_export::kept_by_nms",
    lambda boxes, scores, iou_threshold, max_per_class: boxes.new_empty(boxes.shape[:2], dtype=torch.bool),
    lib=_library,
)
_kept_by_nms = torch.ops.effdet_fast_export.kept_by_nms.default


class OnnxOperators:
    """For ONNX files, through `onnx_translations`. Methods as of `effdet_fast.export.graph.Operators`.

    Args:
        iou_threshold: Boxes of the same class above this IoU are suppressed.
        max_detections: Per image.
        num_classes: Labels are below.
    """

    def __init__(self, iou_threshold: float, max_detections: int, num_classes: int) -> None:
        self.max_detections, self.num_classes = max_detections, num_classes
        # The largest float32 that is not above the threshold: a float32 is above the one exactly if it is above the other.
        rounded = np.float32(iou_threshold)
        self.iou_threshold = float(
            rounded if rounded <= iou_threshold else np.nextafter(rounded, np.float32(-math.inf))
        )

    def largest(self, values: Tensor, count: int) -> Tensor:
        return values.topk(count, dim=1).indices  # ONNX's TopK puts the first of equal values first

    def suppress(self, boxes: Tensor, labels: Tensor, takes_part: Tensor) -> Tensor:
        # A class's own boxes have their rank as a score, so that equal scores keep their order, and all others have 0.
        rank = torch.arange(boxes.shape[1], 0, -1, dtype=torch.float32)
        is_class = labels.unsqueeze(1) == torch.arange(self.num_classes).view(1, -1, 1)
        scores = torch.where(is_class & takes_part.unsqueeze(1), rank, 0.0)
        return _kept_by_nms(boxes, scores, self.iou_threshold, self.max_detections)


def onnx_translations() -> dict[Callable, Callable]:
    """What `torch.onnx.export` has to be told to write a graph with `OnnxOperators`."""
    from onnxscript import opset18

    op: Any = opset18

    def kept_by_nms(boxes: Any, scores: Any, iou_threshold: float, max_per_class: int) -> Any:
        # Rows (image, class, box); as a box has one class, image and box say it all.
        selected = op.NonMaxSuppression(
            boxes,
            scores,
            op.Constant(value_ints=[max_per_class]),
            op.Constant(value_floats=[iou_threshold]),
            op.Constant(value_floats=[0.5]),  # between 0 and the lowest rank
        )
        kept = op.Gather(selected, op.Constant(value_ints=[0, 2]), axis=1)
        ones = op.Expand(op.Constant(value_float=1.0), op.Shape(kept, start=0, end=1))
        zeros = op.Expand(op.Constant(value_float=0.0), op.Shape(boxes, start=0, end=2))
        return op.Greater(op.ScatterND(zeros, kept, ones), op.Constant(value_float=0.5))

    return {_kept_by_nms: kept_by_nms}
