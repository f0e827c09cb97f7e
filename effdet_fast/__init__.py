"""Fast, exact operators for RetinaNet and EfficientDet, and the models, training and evaluation on top of them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from effdet_fast.version import __version__

if TYPE_CHECKING:
    from effdet_fast.acceleration import accelerate, patch_torchvision, restore
    from effdet_fast.checkpoints.convert import convert_checkpoint
    from effdet_fast.cpu_tuning import empty_cache, tune_cpu
    from effdet_fast.detector import Detector
    from effdet_fast.evaluation.evaluate_checkpoint import evaluate
    from effdet_fast.export import export_model
    from effdet_fast.models import create_model, list_models
    from effdet_fast.ops import set_debug
    from effdet_fast.prediction import predict
    from effdet_fast.training import TrainConfig, train

# Imported on first use: neither the command line nor a user of the ops waits for what they do not need.
_HOMES = {
    "Detector": "effdet_fast.detector",
    "TrainConfig": "effdet_fast.training",
    "accelerate": "effdet_fast.acceleration",
    "convert_checkpoint": "effdet_fast.checkpoints.convert",
    "create_model": "effdet_fast.models",
    "empty_cache": "effdet_fast.cpu_tuning",
    "evaluate": "effdet_fast.evaluation.evaluate_checkpoint",
    "export_model": "effdet_fast.export",
    "list_models": "effdet_fast.models",
    "patch_torchvision": "effdet_fast.acceleration",
    "predict": "effdet_fast.prediction",
    "restore": "effdet_fast.acceleration",
    "set_debug": "effdet_fast.ops",
    "train": "effdet_fast.training",
    "tune_cpu": "effdet_fast.cpu_tuning",
}

__all__ = [
    "Detector",
    "TrainConfig",
    "__version__",
    "accelerate",
    "convert_checkpoint",
    "create_model",
    "empty_cache",
    "evaluate",
    "export_model",
    "list_models",
    "patch_torchvision",
    "predict",
    "restore",
    "set_debug",
    "train",
    "tune_cpu",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
