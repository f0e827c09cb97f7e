"""What shows that the ops work here: calls at odd sizes, in both layouts, and how far each is from its reference.

`effdet-fast doctor` runs them on an installation, the emulation and the sanitizers on every kernel.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from effdet_fast import ops
from effdet_fast.random_calls import (
    Call,
    Draw,
    batch_norm,
    batched_nms,
    decode_detections,
    depthwise_conv,
    depthwise_conv_levels,
    detection_loss,
    focal_loss,
    fusion,
    match_anchors,
    nms,
    nms_padded,
    soft_nms,
    squeeze_excite,
)

TOLERANCE = 1e-4


def results_of(call: Call) -> list[Tensor]:
    """What it gives without gradients, then with them, and twice the gradients: a second backward may find its buffers gone."""
    with torch.no_grad():
        plain = _tensors(call(*call.differentiable))
    if not call.differentiable:
        return plain
    leaves = [x.detach().requires_grad_() for x in call.differentiable]
    y = call(*leaves)
    upstream = torch.linspace(0.5, 1.5, y.numel(), device=y.device).view(y.shape).to(y.dtype)
    grads = [torch.autograd.grad(y, leaves, upstream, retain_graph=True) for _ in range(2)]
    return [*plain, y.detach(), *grads[0], *grads[1]]


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def error_of(call: Call) -> float:
    """The largest difference between an op and its reference, relative to the largest value of each tensor."""
    ours = results_of(call)
    with ops.use_reference():
        expected = results_of(call)
    errors = [_difference(mine, other) for mine, other in zip(ours, expected, strict=True)]
    return float(torch.stack(errors).max())  # NaN if one of them is


def _difference(mine: Tensor, other: Tensor) -> Tensor:
    if not mine.is_floating_point() or not mine.numel():
        return torch.tensor(float(not torch.equal(mine, other)))
    return ((mine - other).abs().max() / other.abs().max().clamp(min=1e-3)).float().cpu()


def _focal_losses(draw: Draw) -> list[Call]:
    sums = focal_loss(draw, 41, 9, reduction="sum")  # the last vector is not full
    return [sums, focal_loss(draw, 3, 43, 7), focal_loss(draw, 3, 43, 7, soft=True, gamma=2.0)]


def _detection_losses(draw: Draw) -> list[Call]:
    per_image: dict[str, Any] = {"box_loss": "giou", "normalizer": "per_image", "box_loss_weight": 2.0}
    return [
        detection_loss(
            each, [(4, 8), (3, 3)], classes=classes, whole=whole, **options
        )  # vectors may straddle the classes
        for each in draw.layouts()
        for classes, whole in ((9, True), (8, False))
        for options in ({}, per_image)
    ]


def _fusions(draw: Draw) -> list[Call]:
    nodes = (("none", "nearest", "max_pool"), ("none", "nearest"), ("none", "none", "max_pool"))
    return [
        fusion(each, resample, size, channels=channels, activation="silu")
        for each in draw.layouts()
        for resample in nodes
        for channels, size in ((8, (6, 6)), (11, (9, 5)))
    ]


def _depthwise_convs(draw: Draw) -> list[Call]:
    filters = ((16, 5, 2, False), (8, 3, 1, True), (40, 5, 1, True), (88, 3, 2, True), (7, 5, 2, True))
    return [
        depthwise_conv(each, 2, channels, 9, 17, kernel=k, bias=bias, stride=stride, padding="same", prologue="silu")
        for each in draw.layouts()
        for channels, k, stride, bias in filters
    ]


def _depthwise_convs_of_levels(draw: Draw) -> list[Call]:
    sizes = ((2, 13, 17), (2, 4, 4), (1, 1, 2))
    return [
        depthwise_conv_levels(each, sizes, channels, k, stride=stride, padding="same")
        for each in draw.layouts()
        for channels, k, stride in ((10, 3, 1), (40, 5, 2))
    ]


def _suppressions(draw: Draw) -> list[Call]:
    # Images of more boxes than a block takes alone, and more that stay than one block keeps.
    padded = [nms_padded(draw, 2, 1200, max_detections=count) for count in (700, 1060)]
    few = nms_padded(draw, 3, 333, classes=5, max_detections=50, score_threshold=0.1)
    return [*padded, few, batched_nms(draw, 200), nms(draw, 333)]


def _soft_suppressions(draw: Draw) -> list[Call]:
    single = [soft_nms(draw, 200, method="linear"), soft_nms(draw, 200, score_threshold=0.05)]
    return [
        *single,
        *(nms_padded(draw, 3, 120, max_detections=50, score_threshold=0.1, method=m) for m in ("linear", "gaussian")),
    ]


def _matches(draw: Draw) -> list[Call]:
    low_quality = {"neg_iou": 0.4, "force_match": False, "allow_low_quality_matches": True}
    return [
        match_anchors(draw, 280, 3, 40, counted, **options) for counted, options in ((False, {}), (True, low_quality))
    ]


def _batch_norms(draw: Draw) -> list[Call]:
    shapes = ((3, 40, 7, 8), (2, 7, 16, 16), (2, 88, 3, 3), (1, 8, 40, 24))
    calls = [batch_norm(each, *shape, activation="silu") for each in draw.layouts() for shape in shapes]
    return [*calls, *(batch_norm(each, 2, 40, 7, 5, training=False, activation="relu6") for each in draw.layouts())]


def _decodings(draw: Draw) -> list[Call]:
    limits = {"max_candidates": 90, "max_detections": 90}
    small = [decode_detections(each, ((5, 5), (3, 3)), clipped=each.channels_last, **limits) for each in draw.layouts()]
    sizes = ((13, 11), (9, 4), (4, 2))
    large = [decode_detections(each, sizes, per_cell=9, classes=7, max_candidates=500) for each in draw.layouts()]
    return [*small, *large]


def _excitations(draw: Draw) -> list[Call]:
    # Several parts of an image and of a plane, and fewer than one.
    shapes = ((2, 40, 44, 48, 10), (2, 88, 3, 3, 5), (3, 7, 13, 17, 2))
    return [squeeze_excite(each, *shape, squeezed=squeezed) for each in draw.layouts() for *shape, squeezed in shapes]


CALLS: dict[str, Callable[[Draw], list[Call]]] = {
    "sigmoid_focal_loss": _focal_losses,
    "detection_loss": _detection_losses,
    "weighted_fusion": _fusions,
    "depthwise_conv2d": _depthwise_convs,
    "depthwise_conv2d_levels": _depthwise_convs_of_levels,
    "batched_nms_padded": _suppressions,
    "soft_nms": _soft_suppressions,
    "match_anchors": _matches,
    "batch_norm_act": _batch_norms,
    "decode_detections": _decodings,
    "squeeze_excite": _excitations,
}


def self_test(name: str, device: torch.device) -> float:
    """Of one op, its largest error in float32; or the first that is not within TOLERANCE, as more calls may do more harm."""
    worst = 0.0
    for call in CALLS[name](Draw(device)):
        error = error_of(call)
        if not error <= TOLERANCE:
            return error
        worst = max(worst, error)
    return worst


SELF_TESTS: dict[str, Callable[[torch.device], float]] = {name: partial(self_test, name) for name in CALLS}
