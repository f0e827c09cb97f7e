"""Models by name."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from effdet_fast.models.config import DetectorConfig, check_fields
from effdet_fast.models.detection_model import DetectionModel
from effdet_fast.models.model_table import CONFIGS
from effdet_fast.models.weights import load_backbone_checkpoint, load_checkpoint


def list_models() -> list[str]:
    """The names `create_model` knows."""
    return list(CONFIGS)


def model_config(name: str, **overrides: Any) -> DetectorConfig:
    """The released configuration of a model, or one that differs from it in some fields.

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
    """Builds a detector with freshly initialized, or loaded, weights.

    Args:
        name: One of `list_models()`. A "tf_" prefix is accepted: effdet calls `tf_efficientdet_d0` what is
            `efficientdet_d0` here, and `efficientdet_d0` what is `efficientdet_d0_symmetric` (other padding, no redundant
            biases).
        num_classes: Number of object classes; by default those of the released weights: 90, of RetinaNets 91 (raw COCO ids).
        image_size: Input side or (height, width) in pixels; the released size by default.
        checkpoint: Local file with a whole detector's weights (see `load_checkpoint`).
        backbone_checkpoint: Local file with ImageNet weights of the backbone (see `load_backbone_checkpoint`).
        **config_overrides: Other fields of `DetectorConfig`.

    Raises:
        ValueError: Unknown name or field, a value out of range, or a checkpoint that does not fit.
    """
    given = {"num_classes": num_classes, "image_size": image_size}
    overrides = {key: value for key, value in given.items() if value is not None} | config_overrides
    model = DetectionModel(model_config(name, **overrides))
    if backbone_checkpoint is not None:
        load_backbone_checkpoint(model, backbone_checkpoint)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model
