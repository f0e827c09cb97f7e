"""Detectors, each built from one configuration: EfficientDets with effdet's weights, RetinaNets with torchvision's."""

from effdet_fast.models.config import DetectorConfig
from effdet_fast.models.detection_model import DetectionModel
from effdet_fast.models.model_summary import ModelSummary, summary
from effdet_fast.models.registry import create_model, list_models, model_config
from effdet_fast.models.scaling import compound_scaling, scaled_efficientnet
from effdet_fast.models.weights import Mismatch, load_backbone_checkpoint, load_checkpoint
from effdet_fast.ops import DetectionLoss

__all__ = [
    "DetectionLoss",
    "DetectionModel",
    "DetectorConfig",
    "Mismatch",
    "ModelSummary",
    "compound_scaling",
    "create_model",
    "list_models",
    "load_backbone_checkpoint",
    "load_checkpoint",
    "model_config",
    "scaled_efficientnet",
    "summary",
]
