"""Detectors to export, and exported files run on batches of pictures."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn

from effdet_fast import Detector, create_model
from effdet_fast.data import normalize
from effdet_fast.evaluation.trained_model import TrainedModel
from effdet_fast.models import DetectionModel
from effdet_fast.ops import decode_detections

Run = Callable[[torch.Tensor], dict[str, np.ndarray]]
# As few layers as an EfficientDet can have.
TINY = {"backbone": "efficientnet:0.2,0.1", "max_level": 5, "fpn_cells": 1, "head_repeats": 1, "fpn_channels": 16}
CLASS_NAMES = ["cat", "dog", 'a "quoted" bird', "été", "tree"]
CATEGORY_IDS = [3, 7, 40, 41, 90]


def pictures(batch: int, size: tuple[int, int]) -> torch.Tensor:
    """uint8 [B, 3, H, W]: blobs of every brightness."""
    coarse = torch.rand(batch, 3, 5, 7) * 255
    return nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 255).to(torch.uint8)


def lively_model(name: str, size: tuple[int, int], **options) -> DetectionModel:
    """In evaluation mode, with activations as of a trained model: BatchNorms know their statistics, scores are spread."""
    model = create_model(name, num_classes=len(CLASS_NAMES), image_size=size, **options)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the mean of all batches
    model.train()
    with torch.no_grad():
        for _ in range(8):
            model(normalize(pictures(8, size), model.config.mean, model.config.std))
        outputs = model.eval()(normalize(pictures(8, size), model.config.mean, model.config.std))
        for head, levels, large, shift in ((model.class_net, outputs[0], 3, -3), (model.box_net, outputs[1], 0.7, 0)):
            parameters = list(head.predict.parameters())
            bias = next(p for p in parameters if p.dim() == 1)
            values = torch.cat([x.flatten() for x in levels]) - bias.mean()
            [p for p in parameters if p.dim() == 4][-1].mul_(large / values.abs().quantile(0.99))
            bias.fill_(shift)
    return model.requires_grad_(False)


def as_detector(model: DetectionModel) -> Detector:
    config = model.config
    size, device = config.image_size, torch.device("cpu")
    return Detector(TrainedModel(model, CLASS_NAMES, CATEGORY_IDS, config.mean, config.std, size, device))


def three_pictures(detector: Detector, rows: int) -> tuple[torch.Tensor, float]:
    """Of which the last shows nothing above a score, which is returned, and the second at most five things.

    Their scores are further apart than round-off, so their order is the same wherever they are computed.
    """
    images = pictures(9, detector.image_size)
    scores = predicted(detector, images, max_detections=rows + 1)["scores"]
    apart = np.flatnonzero((scores[:, :-1] - scores[:, 1:]).min(1) > 1e-5)
    by_best = apart[scores[apart, 0].argsort()]
    chosen = by_best[[-1, len(by_best) // 2, 0]]
    second, third = scores[chosen[1:]]
    below = max(third[0], second[5])
    above = second[second > below].min()
    assert above - below > 1e-5 and len(set(chosen)) == 3
    return images[chosen], float(above + below) / 2


def save_checkpoint(model: DetectionModel, path: Path) -> Path:
    config = model.config
    content = {
        "format": 1,
        "model": config.name,
        "config": dataclasses.asdict(config),
        "class_names": CLASS_NAMES,
        "category_ids": CATEGORY_IDS,
        "preprocessing": {"mean": config.mean, "std": config.std, "image_size": config.image_size},
        "state_dict": model.state_dict(),
    }
    torch.save(content, path)
    return path


def run_of(path: Path) -> Run:
    """What the file computes, outputs by name."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return lambda images: dict(zip(names, session.run(None, {"images": images.numpy()}), strict=True))
    program = torch.export.load(path).module()
    return lambda images: {name: value.numpy() for name, value in program(images).items()}


def predicted(detector: Detector, images: torch.Tensor, **options) -> dict[str, np.ndarray]:
    """`DetectionModel.predict` on our kernels, with other thresholds."""
    model = detector.model
    sizes = torch.tensor([model.config.image_size] * len(images), dtype=torch.float32)
    with torch.inference_mode():
        found = model.detect(model(normalize(images, detector.mean, detector.std)), clip_sizes=sizes, **options)
    return {name: getattr(found, name).numpy() for name in ("boxes", "scores", "labels", "counts")}


def every_anchor(detector: Detector, images: torch.Tensor) -> dict[str, np.ndarray]:
    """Boxes [B, N, 4] and scores [B, N, C] by our kernels, put where `decode_detections` says they belong."""
    model = detector.model
    anchors, classes = len(model.anchors()), model.config.num_classes
    every = {"max_candidates": anchors * classes, "iou_threshold": 2.0, "max_detections": anchors * classes}
    dtype = next(model.parameters()).dtype
    sizes = torch.tensor([model.config.image_size] * len(images), dtype=dtype)
    with torch.inference_mode():
        outputs = model(normalize(images, detector.mean, detector.std).to(dtype))
        options = {"num_classes": classes, "clip_sizes": sizes, "box_coder": model.config.box_coder, **every}
        found = decode_detections(*outputs, model.anchors(), **options)
    assert (found.counts == anchors * classes).all()
    boxes = torch.zeros(len(images), anchors, 4, dtype=dtype)
    scores = torch.zeros(len(images), anchors * classes, dtype=dtype)
    boxes.scatter_(1, found.indices.unsqueeze(2).expand(-1, -1, 4), found.boxes)
    scores.scatter_(1, found.indices * classes + found.labels, found.scores)
    return {"boxes": boxes.numpy(), "scores": scores.unflatten(1, (anchors, classes)).numpy()}


def anchor_sides(detector: Detector) -> np.ndarray:
    """[N, 1], the unit of the box deltas."""
    boxes = detector.model.anchors()
    return (boxes[:, 2:] - boxes[:, :2]).amax(1, keepdim=True).numpy()


def exact_anchors(detector: Detector, images: torch.Tensor) -> tuple[dict[str, np.ndarray], float]:
    """`every_anchor` in float64, and how far it is from that in float32, boxes in units of the anchors' sides."""
    exact = every_anchor(as_detector(copy.deepcopy(detector.model).double()), images)
    single = every_anchor(detector, images)
    boxes = np.abs(single["boxes"] - exact["boxes"]) / anchor_sides(detector)
    error = float(max(boxes.max(), np.abs(single["scores"] - exact["scores"]).max()))
    return {name: values.astype(np.float32) for name, values in exact.items()}, error


def assert_same(
    got: dict[str, np.ndarray], expected: dict[str, np.ndarray], unit: float | np.ndarray = 1.0, tolerance: float = 1e-4
) -> None:
    """Everything in the same order; scores within the tolerance, and boxes in a unit: the input's side, or each anchor's.

    In pixels 1e-4 is less than what our own kernels differ by from float64: anchors are several times as large as small inputs.
    """
    assert got.keys() == expected.keys()
    for name, values in expected.items():
        assert got[name].dtype == values.dtype and got[name].shape == values.shape
        if values.dtype == np.int64:
            np.testing.assert_array_equal(got[name], values)
        else:
            scale = unit if name == "boxes" else 1.0
            np.testing.assert_allclose(got[name] / scale, values / scale, rtol=0, atol=tolerance)
