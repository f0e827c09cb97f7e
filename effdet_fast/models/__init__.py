"""EfficientDet and EfficientDet-Lite, weight-compatible with effdet's `tf_efficientdet_*`."""

from effdet_fast.models.checkpoints import Mismatch, load_backbone_checkpoint, load_checkpoint
from effdet_fast.models.config import EfficientDetConfig, compound_scaling
from effdet_fast.models.efficientdet import EfficientDet
from effdet_fast.models.loss import DetectionLoss
from effdet_fast.models.registry import create_model, list_models, model_config

__all__ = [
    "DetectionLoss",
    "EfficientDet",
    "EfficientDetConfig",
    "Mismatch",
    "compound_scaling",
    "create_model",
    "list_models",
    "load_backbone_checkpoint",
    "load_checkpoint",
    "model_config",
]
