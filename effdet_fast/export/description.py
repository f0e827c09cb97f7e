"""What an exported file says about itself, for whoever has nothing but the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from effdet_fast.data.placement import blank_input
from effdet_fast.detector import Detector
from effdet_fast.version import __version__

_BOXES = "x1, y1, x2, y2 in input pixels, clipped to the input"
_ALL_ANCHORS = {
    "boxes": f"float32 [batch, {{anchors}}, 4]: of each anchor, {_BOXES}",
    "scores": "float32 [batch, {anchors}, {classes}]: of each anchor and class, 0 to 1; non-maximum suppression is to follow",
}
_FINAL = {
    "boxes": f"float32 [batch, {{rows}}, 4]: {_BOXES}; zeros beyond the count",
    "scores": "float32 [batch, {rows}]: 0 to 1, descending; zeros beyond the count",
    "labels": "int64 [batch, {rows}]: index into class_names and category_ids; -1 beyond the count",
    "counts": "int64 [batch]: how many rows of each image are detections",
}


def describe(detector: Detector, end_to_end: Mapping[str, Any] | None) -> dict[str, Any]:
    """Classes, input, preprocessing and outputs, as plain values.

    Args:
        detector: What is exported.
        end_to_end: score_threshold, iou_threshold and max_detections; None without non-maximum suppression.
    """
    height, width = detector.image_size
    sizes = {
        "anchors": len(detector.model.anchors("cpu")),
        "classes": len(detector.class_names),
        "rows": None if end_to_end is None else end_to_end["max_detections"],
    }
    outputs = _ALL_ANCHORS if end_to_end is None else _FINAL
    return {
        "producer": f"effdet_fast {__version__}",
        "model": detector.model.config.name,
        "class_names": detector.class_names,
        "category_ids": detector.category_ids,
        "image_size": [height, width],
        "input": f"images: uint8 [batch, 3, {height}, {width}], RGB, 0 to 255; the graph normalizes by mean and std",
        "mean": list(detector.mean),
        "std": list(detector.std),
        "preprocessing": f"scale the upright picture (h, w) by min({height} / h, {width} / w), bilinear with antialiasing, put "
        "it at the top left, fill the rest with padding_colour",
        **(
            {} if detector.depth is None else {"depth": f"of gray values of {detector.depth} bits the upper 8 are kept"}
        ),
        "padding_colour": blank_input((1, 1), detector.mean)[0, 0].tolist(),
        "outputs": {name: text.format(**sizes) for name, text in outputs.items()},
        "end_to_end": end_to_end is not None,
        **(end_to_end or {}),
    }


def as_texts(description: Mapping[str, Any]) -> dict[str, str]:
    """Each value as a text: texts as they are, anything else in JSON."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in description.items()}
