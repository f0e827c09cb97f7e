"""The released models, each as a configuration."""

from __future__ import annotations

import dataclasses
from typing import Any

from effdet_fast.models.config import DetectorConfig

HALF = (0.5, 0.5, 0.5)


def _row(name: str, backbone: str, size: int, channels: int, cells: int, repeats: int, **more: Any) -> DetectorConfig:
    return DetectorConfig(f"efficientdet_{name}", f"efficientnet_{backbone}", (size, size), channels, cells,
                              repeats, **more)  # fmt: skip


def _symmetric(config: DetectorConfig) -> DetectorConfig:
    """The form that effdet calls `efficientdet_*` where this table's own rows are its `tf_efficientdet_*`."""
    name = f"{config.name}_symmetric"
    return dataclasses.replace(config, name=name, padding="symmetric", redundant_bias=False)


def _lite(name: str, backbone: str, size: int, channels: int, cells: int, repeats: int, **more: Any):
    return _row(name, backbone, size, channels, cells, repeats, fusion="sum", activation="relu6", mean=HALF, std=HALF,
                **more)  # fmt: skip


def _retinanet(name: str, depth: int, **more: Any) -> DetectorConfig:
    """RetinaNet (arXiv:1708.02002) as torchvision has it; classes are COCO's raw category ids, 0 to 90, of which 0 is unused."""
    return DetectorConfig(
        f"retinanet_{name}",
        f"resnet{depth}",
        (800, 800),
        fpn_channels=256,
        fpn_cells=1,
        head_repeats=4,
        num_classes=91,
        neck="fpn",
        fusion="sum",
        activation="relu",
        head="conv",
        redundant_bias=False,
        drop_path_rate=0.0,
        aspect_ratios=((2**0.5, 0.5**0.5), (1.0, 1.0), (0.5**0.5, 2**0.5)),
        anchor_style="retinanet",
        box_coder="torchvision",
        neg_iou=0.4,
        force_match=False,
        allow_low_quality_matches=True,
        focal_gamma=2.0,
        box_loss_weight=1.0,
        loss_normalizer="per_image",
        score_threshold=0.05,
        max_candidates=1000,
        candidates_per_level=True,
        max_detections=300,
        **more,
    )


def _retinanet_v1(depth: int) -> DetectorConfig:
    return _retinanet(f"resnet{depth}_fpn", depth, extra_levels="p5", head_norm=None, box_loss="l1",
                      frozen_batch_norm=True)  # fmt: skip


def _retinanet_v2(depth: int) -> DetectorConfig:
    return _retinanet(f"resnet{depth}_fpn_v2", depth, extra_levels="c5", head_norm="group", box_loss="giou")


# The released EfficientDets follow `compound_scaling` only in part: widths were rounded by hand, and cells and resolution
# stop growing at the top. torchvision's COCO weights of retinanet_resnet50_fpn want `backbone_bn_eps=0.0`.
CONFIGS: dict[str, DetectorConfig] = {
    config.name: config
    for config in (
        _row("d0", "b0", 512, 64, 3, 3),
        _row("d1", "b1", 640, 88, 4, 3),
        _row("d2", "b2", 768, 112, 5, 3),
        _row("d3", "b3", 896, 160, 6, 4),
        _row("d4", "b4", 1024, 224, 7, 4),
        _row("d5", "b5", 1280, 288, 7, 4),
        _row("d6", "b6", 1280, 384, 8, 5, fusion="sum"),
        _row("d7", "b6", 1536, 384, 8, 5, fusion="sum", anchor_scale=5.0),
        _row("d7x", "b7", 1536, 384, 8, 5, fusion="sum", max_level=8),
        _symmetric(_row("d0", "b0", 512, 64, 3, 3, drop_path_rate=0.1)),
        _symmetric(_row("d1", "b1", 640, 88, 4, 3)),
        _symmetric(_row("d2", "b2", 768, 112, 5, 3)),
        _symmetric(_row("d3", "b3", 896, 160, 6, 4)),
        _lite("lite0", "lite0", 320, 64, 3, 3, anchor_scale=3.0, drop_path_rate=0.0),
        _lite("lite1", "lite1", 384, 88, 4, 3, anchor_scale=3.0),
        _lite("lite2", "lite2", 448, 112, 5, 3, anchor_scale=3.0),
        _lite("lite3", "lite3", 512, 160, 6, 4),
        _lite("lite3x", "lite3", 640, 200, 6, 4, anchor_scale=3.0),
        _lite("lite4", "lite4", 640, 224, 7, 4),
        *(form(depth) for depth in (18, 34, 50, 101) for form in (_retinanet_v1, _retinanet_v2)),
    )
}
