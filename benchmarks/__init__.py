"""Measures the ops against their peers: `python -m benchmarks --help`."""

import time

START = time.monotonic()  # of the process, before PyTorch is imported, which takes seconds

OPS = (
    "focal_loss",
    "detection_loss",
    "fusion",
    "depthwise_conv",
    "nms",
    "soft_nms",
    "anchor_matching",
    "batch_norm_act",
    "decode_detections",
    "squeeze_excite",
)
BENCHMARKS = (*OPS, "training_step")
