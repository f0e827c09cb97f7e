"""Models by name."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from effdet_fast.models.checkpoints import load_backbone_checkpoint, load_checkpoint
from effdet_fast.models.config import DetectorConfig, check_fields
from effdet_fast.models.detection_model import DetectionModel
from effdet_fast.models.model_table import CONFIGS


def list_models() -> list[str]:
    """The names `create_model` knows."""
    return list(CONFIGS)


def model_config(name: str) -> DetectorConfig:
    """The released configuration of a model.

    Args:
        name: One of `list_models()`; a "tf_" prefix is accepted.

    Raises:
        ValueError: Unknown name.
    """
    config = CONFIGS.get(name.removeprefix("tf_")) if isinstance(name, str) else None
    if config is None:
        raise ValueError(f"create_model: unknown model {name!r}; known are {list_models()}")
    return config


def create_model(
    name: str,
    num_classes: int = 90,
    *,
    image_size: int | tuple[int, int] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    backbone_checkpoint: str | os.PathLike[str] | None = None,
    **config_overrides: Any,
) -> DetectionModel:
    """Builds a detector with freshly initialised, or loaded, weights.

    Args:
        name: One of `list_models()`; a "tf_" prefix is accepted.
        num_classes: Number of object classes.
        image_size: Input side or (height, width) in pixels; the released size by default.
        checkpoint: Local file with a whole detector's weights (see `load_checkpoint`).
        backbone_checkpoint: Local file with ImageNet weights of the backbone (see `load_backbone_checkpoint`).
        **config_overrides: Other fields of `DetectorConfig`.

    Raises:
        ValueError: Unknown name or field, a value out of range, or a checkpoint that does not fit.
    """
    config = model_config(name)
    check_fields(config_overrides, "create_model")
    overrides = {"num_classes": num_classes, **config_overrides}
    if image_size is not None:
        overrides["image_size"] = image_size
    model = DetectionModel(dataclasses.replace(config, **overrides))
    if backbone_checkpoint is not None:
        load_backbone_checkpoint(model, backbone_checkpoint)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model
