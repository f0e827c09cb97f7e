"""`export_model` writes a trained detector to one file that needs nothing of this package."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from effdet_fast.detector import Detector
from effdet_fast.export.description import describe
from effdet_fast.export.graph import AllAnchors, ExportedGraph, FinalDetections, Finish, Operators
from effdet_fast.export.onnx_file import check_packages, onnx_bytes
from effdet_fast.export.onnx_operators import OnnxOperators
from effdet_fast.export.torch_export_file import torch_export_bytes
from effdet_fast.export.torch_operators import TorchOperators
from effdet_fast.files import refuse_existing, write_atomically
from effdet_fast.models.detection_model import check_detection_options
from effdet_fast.ops import use_reference

FORMATS = {"onnx": ".onnx", "torch_export": ".pt2"}


def export_model(
    checkpoint: str | os.PathLike[str] | Detector,
    output: str | os.PathLike[str] | None = None,
    format: str | None = None,
    *,
    end_to_end: bool = False,
    image_size: int | tuple[int, int] | None = None,
    score_threshold: float | None = None,
    iou_threshold: float | None = None,
    max_detections: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Export a trained detector to an ONNX file (opset 18) or a program of `torch.export`, in standard operators.

    The exported graph takes RGB images as uint8 [B, 3, H, W], for any B >= 1 and the (H, W) of the model, and normalizes them
    itself. Its outputs, by name, are

    - "boxes" float32 [B, N, 4] and "scores" float32 [B, N, C] of all anchors and classes, for non-maximum suppression
      elsewhere; or
    - with `end_to_end`, "boxes" float32 [B, K, 4], "scores" [B, K], "labels" int64 [B, K] and "counts" int64 [B]: what
      `DetectionModel.predict` gives; rows past an image's count hold zeros and -1.

    Boxes are xyxy in input pixels, clipped to the input. An ONNX file suppresses by the operator NonMaxSuppression, a program of
    torch.export in a `while_loop`. The description of classes, input size, preprocessing and outputs is in the ONNX file's
    `metadata_props`, or in "metadata.json" among `torch.export.load`'s `extra_files`.

    Args:
        checkpoint: A `best.pt` or `last.pt`, a detector that `convert_checkpoint` wrote as "effdet_fast", or a `Detector`.
        output: The file to write; None puts it beside the checkpoint file, with the format's ending.
        format: "onnx" or "torch_export"; None takes the one of `output`'s ending, .onnx or .pt2.
        end_to_end: Include the non-maximum suppression.
        image_size: Input side or (height, width) in pixels, if other than the one trained at; with a checkpoint file only.
        score_threshold: With `end_to_end`: detections with a lower score are dropped; None takes the model's own threshold.
        iou_threshold: With `end_to_end`: threshold of the suppression; None takes the model's own.
        max_detections: With `end_to_end`: K, the detections of an image; None takes the model's own.
        overwrite: Replace an existing `output`.

    Returns:
        The description that the file holds, with its path under "path".

    Raises:
        FileExistsError: `output` exists.
        FileNotFoundError: There is no such checkpoint.
        TypeError: A threshold is not a number.
        ValueError: The checkpoint is not one of a trained detector, an option is out of range or does not go with the others, or
            ONNX is asked for without the packages onnx and onnxscript.

    Example:
        ```python
        effdet_fast.export_model("runs/exp1/best.pt", "model.onnx", end_to_end=True)
        ```
    """
    if output is None:
        output = _beside(checkpoint, format)
    output = os.fspath(output)
    format = _format(output, format)
    refuse_existing([output], overwrite)
    given = (score_threshold, iou_threshold, max_detections)
    if not end_to_end and given != (None, None, None):
        raise ValueError("export: score_threshold, iou_threshold and max_detections go with end_to_end")
    if format == "onnx":
        check_packages()
    if not isinstance(checkpoint, Detector):
        checkpoint = Detector.from_checkpoint(checkpoint, "cpu", image_size)
    elif image_size is not None:
        raise ValueError("export: image_size goes with a checkpoint file, a Detector has its own")
    options = _options(checkpoint, *given) if end_to_end else None
    description = describe(checkpoint, options)
    program = _trace(checkpoint, options, format)
    content = (onnx_bytes if format == "onnx" else torch_export_bytes)(program, description)
    write_atomically(output, lambda path: Path(path).write_bytes(content))
    return {"path": output, **description}


def _beside(checkpoint: str | os.PathLike[str] | Detector, format: str | None) -> Path:
    if isinstance(checkpoint, Detector) or format is None:
        raise ValueError("export: output must be given unless there are a checkpoint file and a format to name it by")
    return Path(checkpoint).with_suffix(FORMATS.get(format, ""))


def _format(output: str, format: str | None) -> str:
    if format is None:
        format = next((name for name, ending in FORMATS.items() if output.endswith(ending)), None)
        if format is None:
            raise ValueError(f"export: format must be given unless output ends in .onnx or .pt2, got {output!r}")
    if format not in FORMATS:
        raise ValueError(f"export: format must be one of {list(FORMATS)}, got {format!r}")
    return format


def _options(
    detector: Detector, score_threshold: float | None, iou_threshold: float | None, max_detections: int | None
) -> dict[str, Any]:
    config = detector.model.config
    score = config.score_threshold if score_threshold is None else score_threshold
    iou = config.nms_iou if iou_threshold is None else iou_threshold
    max_detections = config.max_detections if max_detections is None else max_detections
    check_detection_options("export", score, iou, max_detections)
    return {"score_threshold": score, "iou_threshold": iou, "max_detections": max_detections}


def _finish(detector: Detector, options: dict[str, Any] | None, format: str) -> Finish:
    if options is None:
        return AllAnchors(detector.model)
    iou_threshold, max_detections = options["iou_threshold"], options["max_detections"]
    operators: Operators = TorchOperators(iou_threshold, max_detections)
    if format == "onnx":
        operators = OnnxOperators(iou_threshold, max_detections, detector.model.config.num_classes)
    return FinalDetections(detector.model, operators, options["score_threshold"], max_detections)


def _trace(detector: Detector, options: dict[str, Any] | None, format: str) -> ExportedProgram:
    graph = ExportedGraph(detector, _finish(detector, options, format))
    images = torch.zeros(2, 3, *detector.image_size, dtype=torch.uint8)  # a batch of 1 would be taken for a constant
    shapes = {"images": {0: Dim("batch", min=1)}}
    with use_reference(), torch.no_grad():
        return torch.export.export(graph, (images,), dynamic_shapes=shapes, strict=False)
