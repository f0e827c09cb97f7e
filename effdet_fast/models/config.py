"""The configuration of a detector: one frozen dataclass."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from effdet_fast._choices import (
    ACTIVATION_NAMES,
    BOX_CODERS,
    BOX_LOSSES,
    FUSION_METHODS,
    LOSS_NORMALIZERS,
    MAX_DETECTIONS,
    MAX_LEVELS,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Backbone and neck are checked where they are built.
CHOICES: dict[str, tuple[str | None, ...]] = {
    "fusion": tuple(FUSION_METHODS),
    "activation": ACTIVATION_NAMES,
    "extra_levels": ("efficientdet", "c5", "p5", "pool"),
    "head": ("separable", "conv"),
    "head_norm": ("batch", "group", None),
    "padding": ("same", "symmetric"),
    "anchor_style": ("efficientdet", "retinanet"),
    "box_coder": tuple(BOX_CODERS),
    "box_loss": tuple(BOX_LOSSES),
    "loss_normalizer": tuple(LOSS_NORMALIZERS),
}
# The most that each count may be: far beyond any model, and little enough that a broken file is refused and not built for hours.
COUNTS = {
    "num_classes": 100_000,
    "fpn_channels": 8192,
    "fpn_cells": 64,
    "head_repeats": 64,
    "num_scales": 64,
    "max_candidates": 1 << 30,
    "max_detections": MAX_DETECTIONS,
}
MAX_LEVEL = 3 + MAX_LEVELS - 1  # as many levels as the detection loss takes
MAX_SIDE = 1 << 15
MAX_ASPECT_RATIOS = 64
SWITCHES = (
    "frozen_batch_norm",
    "redundant_bias",
    "gradient_checkpointing",
    "force_match",
    "allow_low_quality_matches",
    "candidates_per_level",
)
# What each number must be, in words and as a test.
NUMBERS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "drop_path_rate": ("in [0, 1)", lambda x: 0 <= x < 1),
    "anchor_scale": ("> 0", lambda x: x > 0),
    "pos_iou": ("in (0, 1]", lambda x: 0 < x <= 1),
    "neg_iou": ("in (0, 1]", lambda x: 0 < x <= 1),
    "focal_alpha": ("in [0, 1], or -1 for no weighting", lambda x: x == -1 or 0 <= x <= 1),
    "focal_gamma": (">= 0", lambda x: x >= 0),
    "label_smoothing": ("in [0, 1]", lambda x: 0 <= x <= 1),
    "box_loss_delta": ("> 0", lambda x: x > 0),
    "box_loss_weight": (">= 0", lambda x: x >= 0),
    "nms_iou": ("in [0, 1]", lambda x: 0 <= x <= 1),
    "backbone_bn_eps": (">= 0 or None", lambda x: x >= 0),
    "score_threshold": ("in [0, 1] or None", lambda x: 0 <= x <= 1),
}
NONE_ALLOWED = ("backbone_bn_eps", "score_threshold")


@dataclass(frozen=True)
class DetectorConfig:
    """The configuration of a detector: its layers, anchors, labels, loss and post-processing.

    `model_config` gives that of a released model. Values are checked when it is made; the names of backbone and neck where these
    are built, by `create_backbone` and `create_neck`.

    Attributes:
        name: Model name, as `list_models()` gives it.
        backbone: Backbone name; see `create_backbone`.
        image_size: Input (height, width) in pixels; one number stands for both.
        fpn_channels: Channels of every pyramid level inside the neck and the heads.
        fpn_cells: Repeats of the cells of BiFPN and NAS-FPN; FPN and PANet are one pass.
        head_repeats: Convolutions before the prediction layer of each head.
        num_classes: Number of object classes; labels are 0 to num_classes - 1, there is no background class.
        neck: Feature pyramid: "fpn" (arXiv:1612.03144), "panet" (arXiv:1803.01534), "nas_fpn" (arXiv:1904.07392) or "bifpn"
            (arXiv:1911.09070).
        fusion: How neck nodes weigh their inputs: "fast", "softmax" or "sum" (no weights).
        activation: Activation of neck and heads: "silu", "relu" or "relu6".
        min_level: Finest pyramid level, 3. Level l has stride 2^l.
        max_level: Coarsest pyramid level, 5 to 10.
        extra_levels: How levels past the backbone's are made: "efficientdet" (1x1 convolution, BatchNorm and max-pool of C5,
            then max-pool), "c5" and "p5" (3x3 convolutions of stride 2, first of C5 or of P5) or "pool" (every second pixel of
            P5). P5 is the finished one of FPN and PANet; for NAS-FPN and BiFPN, C5 after a lateral convolution.
        head: Convolutions of the heads, shared by all levels: "separable" or "conv" (3x3).
        head_norm: Normalization after each of them: "batch", one BatchNorm for each level; "group", one GroupNorm of 32 groups
            for all levels; or None.
        padding: Padding of EfficientNet's and EfficientDet's convolutions and poolings: "same", TensorFlow's, puts an odd pixel
            right and below; "symmetric" is PyTorch's. ResNets are always symmetric.
        backbone_bn_eps: eps of the backbone's BatchNorms; None takes what the backbone's published weights were trained with.
        frozen_batch_norm: Whether the backbone's BatchNorms keep their statistics, weights and biases in training.
        redundant_bias: Whether convolutions followed by a normalization have a bias (EfficientDet's released weights do).
        drop_path_rate: Stochastic depth of EfficientNets in training, in [0, 1): the probability to drop a residual branch, which
            grows linearly from 0 at the first block towards this rate.
        gradient_checkpointing: Keep only each block's input in the forward pass and compute the block again in the
            backward pass: less memory, more time, the same gradients.
        num_scales: Anchor scales 2^(i / num_scales) per cell.
        aspect_ratios: Anchor (width, height) factors per cell.
        anchor_scale: Side of the basic anchor in strides.
        anchor_style: Where anchors lie: "efficientdet" or "retinanet"; see `generate_anchors`.
        box_coder: What box outputs mean, "effdet" or "torchvision"; see `effdet_fast.ops.match_anchors`.
        pos_iou: An anchor whose best IoU with an object reaches this is positive.
        neg_iou: An anchor whose best IoU is below this is background; those between the two are ignored.
        force_match: Give each object its best anchor whatever the IoU, as effdet does; see `effdet_fast.ops.match_anchors`.
        allow_low_quality_matches: The same by torchvision's rule; excludes `force_match`.
        focal_alpha: Focal loss: weight of positives, in [0, 1]; -1 for no weighting.
        focal_gamma: Focal loss: focusing exponent, >= 0.
        label_smoothing: Focal loss: smoothing of the targets, in [0, 1].
        box_loss: "huber", "l1", "smooth_l1" or "giou"; see `effdet_fast.ops.detection_loss`.
        box_loss_delta: Where the Huber (or smooth L1) loss turns linear.
        box_loss_weight: Weight of the box loss in the total.
        loss_normalizer: "batch" divides the sums by the positives of all images + 1; "per_image" divides each image's sums by its
            positives and takes the mean over images.
        score_threshold: Detections with a lower score are dropped; None keeps all.
        max_candidates: Number of best scores of an image, over all levels and classes, that enter non-maximum suppression.
        candidates_per_level: Take `max_candidates` scores of each level instead.
        nms_iou: Non-maximum suppression drops boxes of the same class above this IoU.
        max_detections: Largest number of detections in an image.
        mean: RGB mean in 0..1; inputs are (x / 255 - mean) / std.
        std: RGB standard deviation in 0..1.

    Raises:
        ValueError: A value is out of range, or two contradict each other.
    """

    name: str
    backbone: str
    image_size: tuple[int, int]
    fpn_channels: int
    fpn_cells: int
    head_repeats: int
    num_classes: int = 90
    neck: str = "bifpn"
    fusion: str = "fast"
    activation: str = "silu"
    min_level: int = 3
    max_level: int = 7
    extra_levels: str = "efficientdet"
    head: str = "separable"
    head_norm: str | None = "batch"
    padding: str = "same"
    backbone_bn_eps: float | None = None
    frozen_batch_norm: bool = False
    redundant_bias: bool = True
    drop_path_rate: float = 0.2
    gradient_checkpointing: bool = False
    num_scales: int = 3
    aspect_ratios: tuple[tuple[float, float], ...] = ((1.0, 1.0), (1.4, 0.7), (0.7, 1.4))
    anchor_scale: float = 4.0
    anchor_style: str = "efficientdet"
    box_coder: str = "effdet"
    pos_iou: float = 0.5
    neg_iou: float = 0.5
    force_match: bool = True
    allow_low_quality_matches: bool = False
    focal_alpha: float = 0.25
    focal_gamma: float = 1.5
    label_smoothing: float = 0.0
    box_loss: str = "huber"
    box_loss_delta: float = 0.1
    box_loss_weight: float = 50.0
    loss_normalizer: str = "batch"
    score_threshold: float | None = None
    max_candidates: int = 5000
    candidates_per_level: bool = False
    nms_iou: float = 0.5
    max_detections: int = 100
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        # A configuration read back from JSON has lists where this one has tuples.
        object.__setattr__(self, "image_size", _image_size(self.image_size))
        object.__setattr__(self, "aspect_ratios", _tuples(self.aspect_ratios))
        object.__setattr__(self, "mean", _tuples(self.mean))
        object.__setattr__(self, "std", _tuples(self.std))
        for field, choices in CHOICES.items():
            if getattr(self, field) not in choices:
                raise ValueError(
                    f"DetectorConfig: {field} must be one of {list(choices)}, got {getattr(self, field)!r}"
                )
        for field, maximum in COUNTS.items():
            value = getattr(self, field)
            if not _is_integer(value) or not 1 <= value <= maximum:
                raise ValueError(f"DetectorConfig: {field} must be an integer in [1, {maximum}], got {value!r}")
        for field in SWITCHES:
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"DetectorConfig: {field} must be a bool, got {getattr(self, field)!r}")
        if self.min_level != 3 or not _is_integer(self.max_level) or not 5 <= self.max_level <= MAX_LEVEL:
            raise ValueError(
                f"DetectorConfig: the backbone gives levels 3 to 5, so min_level must be 3 and max_level in [5, {MAX_LEVEL}], "
                f"got {self.min_level} and {self.max_level!r}"
            )
        for field, (what, holds) in NUMBERS.items():
            value = getattr(self, field)
            if not (field in NONE_ALLOWED and value is None) and not (_is_number(value) and holds(value)):
                raise ValueError(f"DetectorConfig: {field} must be {what}, got {value!r}")
        if self.neg_iou > self.pos_iou:
            raise ValueError(f"DetectorConfig: neg_iou must be <= pos_iou, got {self.neg_iou} and {self.pos_iou}")
        ratios = self.aspect_ratios
        if (
            not _is_tuple(ratios)
            or not 1 <= len(ratios) <= MAX_ASPECT_RATIOS
            or not all(_is_tuple(r) and len(r) == 2 and _positive(r) for r in ratios)
        ):
            raise ValueError(
                "DetectorConfig: aspect_ratios must be pairs of positive (width, height) factors, "
                f"at most {MAX_ASPECT_RATIOS}, got {ratios!r}"
            )
        for field in ("mean", "std"):
            value = getattr(self, field)
            if not _is_tuple(value) or len(value) != 3 or not all(map(_is_number, value)):
                raise ValueError(f"DetectorConfig: {field} must have 3 values, got {value!r}")
        if not _positive(self.std):
            raise ValueError(f"DetectorConfig: std must be positive, got {self.std}")
        if self.force_match and self.allow_low_quality_matches:
            raise ValueError("DetectorConfig: force_match and allow_low_quality_matches exclude each other, got both")

    @property
    def num_levels(self) -> int:
        """Number of pyramid levels."""
        return self.max_level - self.min_level + 1

    @property
    def anchors_per_cell(self) -> int:
        """Number of anchors at each pixel of a level."""
        return self.num_scales * len(self.aspect_ratios)

    def to_dict(self) -> dict[str, Any]:
        """Convert to a dict of plain Python values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DetectorConfig:
        """Make the configuration that `to_dict` gave, also after a trip through JSON.

        Raises:
            ValueError: A key is not a field, or a value is out of range.
        """
        values = dict(values)
        if "match_iou" in values:  # checkpoints of the first version had one threshold, and another name for delta
            values["pos_iou"] = values["neg_iou"] = values.pop("match_iou")
            values["box_loss_delta"] = values.pop("huber_delta")
        check_fields(values, "DetectorConfig.from_dict")
        return cls(**values)


def check_fields(values: dict[str, Any], caller: str) -> None:
    """Raise a ValueError that lists the fields if a key of `values` is not one."""
    known = [field.name for field in dataclasses.fields(DetectorConfig)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{caller}: unknown configuration field(s) {unknown}; known are {known}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def _is_tuple(value: Any) -> bool:
    return isinstance(value, tuple)


def _positive(values: Iterable[Any]) -> bool:
    return all(_is_number(value) and value > 0 for value in values)


def _tuples(value: Any) -> Any:
    """Lists, also inside of lists, as tuples; anything else as it is."""
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def _image_size(size: Any) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else size
    is_pair = isinstance(pair, (tuple, list)) and len(pair) == 2
    if not is_pair or not all(_is_integer(side) and 1 <= side <= MAX_SIDE for side in pair):
        raise ValueError(
            "DetectorConfig: image_size must be a positive integer or a pair (height, width), "
            f"at most {MAX_SIDE}, got {size!r}"
        )
    return (pair[0], pair[1])
