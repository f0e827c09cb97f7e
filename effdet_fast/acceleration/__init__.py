"""One line that makes an existing model of effdet, timm or torchvision faster, with the same numbers."""

from effdet_fast.acceleration.apply import FAMILIES, accelerate, restore
from effdet_fast.acceleration.patching import Patch, patch_torchvision
from effdet_fast.acceleration.report import Report, Row

__all__ = ["FAMILIES", "Patch", "Report", "Row", "accelerate", "patch_torchvision", "restore"]
