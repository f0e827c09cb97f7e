"""Detectors by name: `list_models`, `model_config` and `create_model`."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from effdet_fast.models.config import DetectorConfig, check_fields
from effdet_fast.models.detection_model import DetectionModel
from effdet_fast.models.model_table import CONFIGS
from effdet_fast.models.weights import load_backbone_checkpoint, load_checkpoint


def list_models() -> list[str]:
    """List the names that `create_model` knows."""
    return list(CONFIGS)


def model_config(name: str, **overrides: Any) -> DetectorConfig:
    """Look up the released configuration of a model, perhaps with other values for some fields.

    Args:
        name: One of `list_models()`; a "tf_" prefix is accepted.
        **overrides: Fields of `DetectorConfig`.

    Raises:
        ValueError: Unknown name or field, or a value out of range.
    """
    config = CONFIGS.get(name.removeprefix("tf_")) if isinstance(name, str) else None
    if config is None:
        raise ValueError(f"create_model: unknown model {name!r}; known are {list_models()}")
    check_fields(overrides, "create_model")
    return dataclasses.replace(config, **overrides)


def create_model(
    name: str,
    num_classes: int | None = None,
    *,
    image_size: int | tuple[int, int] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    backbone_checkpoint: str | os.PathLike[str] | None = None,
    **config_overrides: Any,
) -> DetectionModel:
    """Build a detector by name, with new weights or with those of a file.

    The names are those of EfficientDet (arXiv:1911.09070), D0 to D7x and Lite0 to Lite4, as effdet has them, and of RetinaNet
    (arXiv:1708.02002) as torchvision has it. `effdet_fast.models.summary` counts parameters and multiply-adds.

    Args:
        name: One of `list_models()`. A "tf_" prefix is accepted: effdet calls `tf_efficientdet_d0` what is
            `efficientdet_d0` here, and `efficientdet_d0` what is `efficientdet_d0_symmetric` (other padding, no redundant
            biases).
        num_classes: Number of object classes; by default those of the released weights: 90, of RetinaNets 91 (raw COCO ids).
        image_size: Input side or (height, width) in pixels; the released size by default.
        checkpoint: Local file with a whole detector's weights (see `load_checkpoint`).
        backbone_checkpoint: Local file with ImageNet weights of the backbone (see `load_backbone_checkpoint`).
        **config_overrides: Other fields of `DetectorConfig`.

    Returns:
        A `DetectionModel` on the CPU, in training mode.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: Unknown name or field, a value out of range, or a checkpoint that does not fit.

    Example:
        ```python
        model = effdet_fast.create_model("efficientdet_d0", num_classes=20, neck="panet")
        images = torch.randn(2, 3, 512, 512)  # normalized with model.config.mean and .std
        boxes, labels = torch.tensor([[[10.0, 20, 200, 220]]] * 2), torch.tensor([[17]] * 2)
        model(images, (boxes, labels)).total.backward()
        detections = model.eval().predict(images)
        ```
    """
    given = {"num_classes": num_classes, "image_size": image_size}
    overrides = {key: value for key, value in given.items() if value is not None} | config_overrides
    model = DetectionModel(model_config(name, **overrides))
    if backbone_checkpoint is not None:
        load_backbone_checkpoint(model, backbone_checkpoint)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model
