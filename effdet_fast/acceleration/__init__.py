"""Acceleration of an existing model of effdet, timm or torchvision by one line, with the same results."""

from effdet_fast.acceleration.apply import FAMILIES, accelerate, restore
from effdet_fast.acceleration.patching import Patch, patch_torchvision
from effdet_fast.acceleration.report import Report, Row

__all__ = ["FAMILIES", "Patch", "Report", "Row", "accelerate", "patch_torchvision", "restore"]
