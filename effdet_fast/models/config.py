"""What each EfficientDet is made of: one frozen configuration and the table of the released models."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)

FUSION_METHODS = ("fast", "softmax", "sum")
ACTIVATIONS = ("silu", "relu", "relu6")


@dataclass(frozen=True)
class EfficientDetConfig:
    """Everything that decides the layers, anchors, loss and post-processing of an EfficientDet.

    Attributes:
        name: Model name, as `list_models()` gives it.
        backbone: Backbone name, a row of `effdet_fast.models.efficientnet.VARIANTS`.
        image_size: Input (height, width) in pixels.
        num_classes: Number of object classes; there is no background class.
        fpn_channels: Channels of every pyramid level inside the BiFPN and the heads.
        fpn_cells: BiFPN repeats.
        head_repeats: Separable convolutions before the prediction layer of each head.
        fusion: How BiFPN nodes weigh their inputs: "fast", "softmax" or "sum" (no weights).
        activation: Activation of BiFPN and heads: "silu", "relu" or "relu6".
        min_level, max_level: Pyramid levels; level l has stride 2^l.
        num_scales: Anchor scales 2^(i / num_scales) per cell.
        aspect_ratios: Anchor (width, height) factors per cell.
        anchor_scale: Side of the basic anchor in strides.
        redundant_bias: Whether convolutions followed by a BatchNorm have a bias (the released weights do).
        drop_path_rate: Stochastic depth of the backbone's last block in training; earlier blocks get less, linearly.
        mean, std: Normalisation of RGB in 0..1: (x / 255 - mean) / std.
        focal_alpha, focal_gamma, label_smoothing: Focal loss.
        huber_delta, box_loss_weight: Box loss.
        match_iou: An anchor whose best IoU reaches this is positive.
        max_candidates: Scores, over all levels and classes, that enter non-maximum suppression.
    """

    name: str
    backbone: str
    image_size: tuple[int, int]
    fpn_channels: int
    fpn_cells: int
    head_repeats: int
    num_classes: int = 90
    fusion: str = "fast"
    activation: str = "silu"
    min_level: int = 3
    max_level: int = 7
    num_scales: int = 3
    aspect_ratios: tuple[tuple[float, float], ...] = ((1.0, 1.0), (1.4, 0.7), (0.7, 1.4))
    anchor_scale: float = 4.0
    redundant_bias: bool = True
    drop_path_rate: float = 0.2
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    focal_alpha: float = 0.25
    focal_gamma: float = 1.5
    label_smoothing: float = 0.0
    huber_delta: float = 0.1
    box_loss_weight: float = 50.0
    match_iou: float = 0.5
    max_candidates: int = 5000

    def __post_init__(self) -> None:
        # A configuration read back from JSON has lists where this one has tuples.
        object.__setattr__(self, "image_size", _image_size(self.image_size))
        object.__setattr__(self, "aspect_ratios", tuple(tuple(ratio) for ratio in self.aspect_ratios))
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))
        for field in ("num_classes", "fpn_channels", "fpn_cells", "head_repeats", "num_scales", "max_candidates"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"EfficientDetConfig: {field} must be an integer >= 1, got {value!r}")
        if self.fusion not in FUSION_METHODS:
            raise ValueError(f"EfficientDetConfig: fusion must be one of {list(FUSION_METHODS)}, got {self.fusion!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"EfficientDetConfig: activation must be one of {list(ACTIVATIONS)}, got {self.activation!r}"
            )
        if self.min_level != 3 or self.max_level < 5:
            raise ValueError(
                "EfficientDetConfig: the backbone gives levels 3 to 5, so min_level must be 3 and max_level >= 5, "
                f"got {self.min_level} and {self.max_level}"
            )
        if not self.aspect_ratios or any(
            len(ratio) != 2 or not all(side > 0 for side in ratio) for ratio in self.aspect_ratios
        ):
            raise ValueError(
                "EfficientDetConfig: aspect_ratios must be pairs of positive (width, height) factors, "
                f"got {self.aspect_ratios}"
            )
        for field in ("mean", "std"):
            if len(getattr(self, field)) != 3:
                raise ValueError(f"EfficientDetConfig: {field} must have 3 values, got {getattr(self, field)}")
        if not 0.0 < self.match_iou <= 1.0:
            raise ValueError(f"EfficientDetConfig: match_iou must be in (0, 1], got {self.match_iou}")
        if not 0.0 <= self.drop_path_rate < 1.0:
            raise ValueError(f"EfficientDetConfig: drop_path_rate must be in [0, 1), got {self.drop_path_rate}")

    @property
    def num_levels(self) -> int:
        return self.max_level - self.min_level + 1

    @property
    def anchors_per_cell(self) -> int:
        return self.num_scales * len(self.aspect_ratios)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain Python values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EfficientDetConfig:
        """Inverse of `to_dict`, also after a trip through JSON.

        Raises:
            ValueError: A key is not a field.
        """
        check_fields(values, "EfficientDetConfig.from_dict")
        return cls(**values)


def check_fields(values: dict[str, Any], caller: str) -> None:
    """Raises a ValueError that lists the fields if a key of `values` is not one."""
    known = [field.name for field in dataclasses.fields(EfficientDetConfig)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{caller}: unknown configuration field(s) {unknown}; known are {known}")


def _image_size(size: Any) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else size
    is_pair = isinstance(pair, (tuple, list)) and len(pair) == 2
    if not is_pair or not all(isinstance(side, int) and not isinstance(side, bool) and side >= 1 for side in pair):
        raise ValueError(
            f"EfficientDetConfig: image_size must be a positive integer or a pair (height, width), got {size!r}"
        )
    return (pair[0], pair[1])


def _row(
    name: str, backbone: str, size: int, channels: int, cells: int, repeats: int, **more: Any
) -> EfficientDetConfig:
    return EfficientDetConfig(f"efficientdet_{name}", f"efficientnet_{backbone}", (size, size), channels, cells,
                              repeats, **more)  # fmt: skip


def _lite(name: str, backbone: str, size: int, channels: int, cells: int, repeats: int, **more: Any):
    return _row(name, backbone, size, channels, cells, repeats, fusion="sum", activation="relu6", mean=HALF, std=HALF,
                **more)  # fmt: skip


# The released models. They follow `compound_scaling` only in part: their widths were rounded by hand, and cells and
# resolution stop growing at the top.
CONFIGS: dict[str, EfficientDetConfig] = {
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
        _lite("lite0", "lite0", 320, 64, 3, 3, anchor_scale=3.0, drop_path_rate=0.0),
        _lite("lite1", "lite1", 384, 88, 4, 3, anchor_scale=3.0),
        _lite("lite2", "lite2", 448, 112, 5, 3, anchor_scale=3.0),
        _lite("lite3", "lite3", 512, 160, 6, 4),
        _lite("lite3x", "lite3", 640, 200, 6, 4, anchor_scale=3.0),
        _lite("lite4", "lite4", 640, 224, 7, 4),
    )
}


def compound_scaling(phi: float) -> dict[str, int]:
    """The paper's compound scaling rule (EfficientDet, eq. 1-3), channels rounded to a multiple of 8.

    Args:
        phi: Compound coefficient, 0 for D0.

    Returns:
        `fpn_channels`, `fpn_cells`, `head_repeats` and `image_size` (side in pixels), ready for `create_model`.
        The released models differ from the rule; see `CONFIGS`.

    Raises:
        ValueError: phi is negative.
    """
    if phi < 0:
        raise ValueError(f"compound_scaling: phi must be >= 0, got {phi}")
    return {
        "fpn_channels": int(64 * 1.35**phi / 8 + 0.5) * 8,
        "fpn_cells": 3 + math.floor(phi),
        "head_repeats": 3 + math.floor(phi / 3),
        "image_size": 512 + 128 * math.floor(phi),
    }
