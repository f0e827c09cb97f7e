"""Evaluation: detections in pixels of the original pictures, and pycocotools' metrics of them, over one process or several."""

from effdet_fast.device import autocast
from effdet_fast.evaluation.coco_metrics import METRICS, coco_metrics
from effdet_fast.evaluation.evaluate_checkpoint import evaluate
from effdet_fast.evaluation.evaluate_model import detect_all, evaluate_model
from effdet_fast.evaluation.results import ImageResult, coco_results, image_results, letterbox_sizes
from effdet_fast.evaluation.trained_model import TrainedModel, load_trained_model

__all__ = [
    "METRICS",
    "ImageResult",
    "TrainedModel",
    "autocast",
    "coco_metrics",
    "coco_results",
    "detect_all",
    "evaluate",
    "evaluate_model",
    "image_results",
    "letterbox_sizes",
    "load_trained_model",
]
