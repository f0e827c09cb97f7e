"""Detectors to export, and exported files run on batches of pictures."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn

from effdet_fast import Detector, create_model
from effdet_fast.data import normalize
from effdet_fast.models import DetectionModel

Run = Callable[[torch.Tensor], dict[str, np.ndarray]]
# As few layers as an EfficientDet can have.
TINY = {"backbone": "efficientnet:0.2,0.1", "max_level": 5, "fpn_cells": 1, "head_repeats": 1, "fpn_channels": 16}
CLASS_NAMES = ["cat", "dog", "a \"quoted\" bird", "été", "tree"]
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
        for _ in range(4):
            model(normalize(pictures(4, size), model.config.mean, model.config.std))
        model.eval()
        classes, _ = model(normalize(pictures(4, size), model.config.mean, model.config.std))
        last = [p for p in model.class_net.predict.parameters() if p.dim() == 4][-1]
        bias = next(p for p in model.class_net.predict.parameters() if p.dim() == 1)
        last.mul_(2 / torch.cat([x.flatten() for x in classes]).std())
        bias.fill_(-3)
    return model.requires_grad_(False)


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


def assert_same(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """The same detections in the same order; boxes and scores within 1e-4."""
    assert got.keys() == expected.keys()
    for name, values in expected.items():
        assert got[name].dtype == values.dtype and got[name].shape == values.shape
        if values.dtype == np.int64:
            np.testing.assert_array_equal(got[name], values)
        else:
            np.testing.assert_allclose(got[name], values, rtol=0, atol=1e-4)
