"""Training: the function behind `effdet-fast train`, its options and result, and the steps for a loop of your own.

Everything is imported on first use, so that the command line can read `TrainConfig` without waiting for PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effdet_fast.training.config import TrainConfig
    from effdet_fast.training.graphed_step import GraphedStep
    from effdet_fast.training.monitor import NonFiniteLoss
    from effdet_fast.training.optimizer import ModelEma
    from effdet_fast.training.run import TrainResult, train
    from effdet_fast.training.step import StepLosses, TrainingStep

_HOMES = {
    "GraphedStep": "graphed_step",
    "ModelEma": "optimizer",
    "TrainConfig": "config",
    "NonFiniteLoss": "monitor",
    "StepLosses": "step",
    "TrainResult": "run",
    "TrainingStep": "step",
    "train": "run",
}

__all__ = [
    "GraphedStep",
    "ModelEma",
    "NonFiniteLoss",
    "StepLosses",
    "TrainConfig",
    "TrainResult",
    "TrainingStep",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
