"""Data in COCO format: reading, checking, transforms, and batches for training and evaluation."""

from effdet_fast.data.batch import Batch, normalize
from effdet_fast.data.coco import CocoDetection
from effdet_fast.data.image_io import open_image
from effdet_fast.data.loader import BatchLoader, create_loader
from effdet_fast.data.placement import Placement
from effdet_fast.data.transforms import HorizontalFlip, Letterbox, ScaleJitterCrop, VerticalFlip, apply

__all__ = [
    "Batch",
    "BatchLoader",
    "CocoDetection",
    "HorizontalFlip",
    "Letterbox",
    "Placement",
    "ScaleJitterCrop",
    "VerticalFlip",
    "apply",
    "create_loader",
    "normalize",
    "open_image",
]
