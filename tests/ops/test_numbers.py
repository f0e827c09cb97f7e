"""What is taken for a number, and what is refused: the same by kernels and references, for every number of every op."""

import math
from contextlib import nullcontext
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

from effdet_fast import ops

X = torch.linspace(-2, 2, 2 * 4 * 6 * 6).view(2, 4, 6, 6)
FILTERS, POINTWISE = torch.linspace(-1, 1, 36).view(4, 1, 3, 3), torch.linspace(-1, 1, 8).view(2, 4, 1, 1)
BOXES = torch.tensor([[0.0, 0, 4, 4], [1, 1, 5, 5], [3, 3, 9, 9]])
SCORES, LABELS = torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 0, 1])
HEADS = (torch.linspace(-3, 3, 9).view(1, 3, 1, 3), torch.linspace(-0.3, 0.3, 12).view(1, 4, 1, 3))
MEAN, VAR = torch.zeros(4), torch.ones(4)


def detection_loss(**options):
    options = {"num_classes": 3, **options}
    return ops.detection_loss([HEADS[0]], [HEADS[1]], LABELS[None], BOXES[None] / 9, torch.ones(1), **options)


def batch_norm_act(training=False, **options):
    mean, var = MEAN.clone(), VAR.clone()
    return ops.batch_norm_act(X, mean, var, None, None, training, **options), mean, var


def fusion(**options):
    resample = ["nearest", "nearest"]
    return ops.weighted_fusion([X, X], torch.ones(2), resample=resample, **{"size": (3, 3), **options})


OPS = {
    "match_anchors": lambda **k: ops.match_anchors(BOXES, BOXES[None], LABELS[None], **k),
    "batch_norm_act": batch_norm_act,
    "decode_detections": lambda **k: ops.decode_detections([HEADS[0]], [HEADS[1]], BOXES, **{"num_classes": 3, **k}),
    "depthwise_conv2d": lambda **k: ops.depthwise_conv2d(X, FILTERS, **k),
    "depthwise_conv2d_levels": lambda **k: ops.depthwise_conv2d_levels([X, X], FILTERS, **k),
    "depthwise_separable_conv2d": lambda **k: ops.depthwise_separable_conv2d(X, FILTERS, POINTWISE, **k),
    "detection_loss": detection_loss,
    "sigmoid_focal_loss": lambda **k: ops.sigmoid_focal_loss(HEADS[0], HEADS[0].sigmoid(), reduction="sum", **k),
    "weighted_fusion": fusion,
    "fast_normalized_fusion": lambda **k: ops.fast_normalized_fusion([X, X], torch.ones(2), **k),
    "nms": lambda iou_threshold: ops.nms(BOXES, SCORES, iou_threshold),
    "batched_nms": lambda iou_threshold: ops.batched_nms(BOXES, SCORES, LABELS, iou_threshold),
    "batched_nms_padded": lambda iou_threshold=0.5, **k: ops.batched_nms_padded(
        BOXES[None], SCORES[None], LABELS[None], iou_threshold, **{"method": "linear", **k}
    ),
    "soft_nms": lambda **k: ops.soft_nms(BOXES, SCORES, LABELS, **k),
}
# Values that are in range: for counts and sizes an int, else a float.
NUMBERS = {
    "match_anchors": {"pos_iou": 0.5, "neg_iou": 0.5},
    "batch_norm_act": {"momentum": 0.5, "eps": 0.5},
    "decode_detections": {
        "num_classes": 3,
        "max_candidates": 2,
        "score_threshold": 0.25,
        "iou_threshold": 0.5,
        "max_detections": 2,
        "sigma": 0.5,
    },
    "depthwise_conv2d": {"stride": 2, "padding": 1, "dilation": 2},
    "depthwise_conv2d_levels": {"stride": 2, "padding": 1},
    "depthwise_separable_conv2d": {"stride": 2, "padding": 1, "dilation": 2},
    "detection_loss": {
        "num_classes": 3,
        "alpha": 0.5,
        "gamma": 0.5,
        "delta": 0.5,
        "box_loss_weight": 0.5,
        "label_smoothing": 0.5,
    },
    "sigmoid_focal_loss": {"alpha": 0.5, "gamma": 0.5, "label_smoothing": 0.5, "normalizer": 0.5},
    "weighted_fusion": {"eps": 0.5},
    "fast_normalized_fusion": {"eps": 0.5},
    "nms": {"iou_threshold": 0.5},
    "batched_nms": {"iou_threshold": 0.5},
    "batched_nms_padded": {"iou_threshold": 0.5, "score_threshold": 0.25, "max_detections": 2, "sigma": 0.5},
    "soft_nms": {"sigma": 0.5, "iou_threshold": 0.5, "score_threshold": 0.25, "max_detections": 2},
}
ARGUMENTS = [(op, name, value) for op, numbers in NUMBERS.items() for name, value in numbers.items()]
TENSORS_TAKEN = {("batch_norm_act", "momentum"), ("sigmoid_focal_loss", "normalizer")}
NONE_MEANS_SOMETHING = {"score_threshold", "max_detections", "normalizer"}


class Two(IntEnum):
    TWO = 2


def outcome(op, arguments, reference):
    """Its values, or the type and message of the exception."""
    with ops.use_reference() if reference else nullcontext():
        try:
            return [t.tolist() for t in tree_leaves(OPS[op](**arguments))]
        except (TypeError, ValueError) as error:
            return type(error), str(error)


def refused(outcome):
    return outcome[0] if isinstance(outcome, tuple) else None


def both(op, arguments):
    kernel, reference = (outcome(op, arguments, use_reference) for use_reference in (False, True))
    if refused(kernel) or refused(reference):
        assert kernel == reference
    else:
        for ours, theirs in zip(kernel, reference, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    return kernel


def others(name):
    """What else must be given for the number to be looked at, or to fit."""
    return {"momentum": {"training": True}, "neg_iou": {"pos_iou": 1.0}}.get(name, {})


@pytest.mark.parametrize(("op", "name", "value"), ARGUMENTS)
def test_taken(op, name, value):
    """NumPy's scalars are the numbers they stand for, and an int is a float."""
    more = others(name)
    expected = both(op, {name: value, **more})
    assert refused(expected) is None
    same = [np.int64(value), np.uint8(value)] if isinstance(value, int) else [np.float32(value), np.float64(value)]
    if (op, name) in TENSORS_TAKEN:
        same.append(torch.tensor(value))
    for number in same:
        assert both(op, {name: number, **more}) == expected, number
    if isinstance(value, float):
        for one in (1, np.int32(1), True):
            assert both(op, {name: one, **more}) == both(op, {name: 1.0, **more})


@pytest.mark.parametrize(("op", "name", "value"), ARGUMENTS)
def test_refused(op, name, value):
    no_numbers = [
        "2",
        b"2",
        Fraction(1, 2),
        Decimal("0.5"),
        1j,
        1 << 63,
        -(1 << 63) - 1,
        np.uint64(1 << 63),
        [1.0],
        {},
        np.array([1, 2]),
    ]
    if (op, name) not in TENSORS_TAKEN:
        no_numbers += [torch.tensor(1), torch.tensor(0.5), torch.ones(2)]
    if isinstance(value, int):
        no_numbers += [True, 2.0, math.nan, np.float64(2), np.bool_(True)]
    if name not in NONE_MEANS_SOMETHING or (op, name) == ("soft_nms", "score_threshold"):
        no_numbers.append(None)
    if (op, name) in {("decode_detections", "max_detections"), ("batched_nms_padded", "max_detections")}:
        no_numbers.append(None)
    if name == "padding":
        no_numbers = [bad for bad in no_numbers if not isinstance(bad, str)]  # which names a rule: ValueError
    named = f"{op}: {name} must be ".replace("separable_", "")
    for bad in no_numbers:
        found = both(op, {name: bad, **others(name)})
        assert refused(found) is TypeError, (bad, found)
        assert found[1].startswith(named), found[1]


@pytest.mark.parametrize(("op", "name", "value"), ARGUMENTS)
def test_out_of_range(op, name, value):
    for number in (-3, -0.5, 0, 0.0, math.nan, math.inf, -math.inf, np.float32("nan"), np.int64(-3)):
        if isinstance(value, int) and not isinstance(number, int | np.integer):
            continue
        found = both(op, {name: number, **others(name)})
        assert refused(found) in (None, ValueError), (number, found)
        assert refused(found) is None or name in found[1]


@pytest.mark.parametrize(
    ("op", "name", "values"),
    [
        ("depthwise_conv2d", "stride", (2, 1)),
        ("depthwise_conv2d", "dilation", (2, 1)),
        ("depthwise_conv2d", "padding", (1, 2)),
        ("depthwise_conv2d", "padding", (0, 1, 2, 3)),
        ("depthwise_conv2d_levels", "stride", (2, 1)),
        ("depthwise_conv2d_levels", "padding", (0, 1, 2, 3)),
        ("weighted_fusion", "size", (3, 5)),
    ],
)
def test_each_of_several(op, name, values):
    expected = both(op, {name: values})
    for number in (int, np.int64, np.uint8):
        assert both(op, {name: [number(value) for value in values]}) == expected
    for bad in (1.0, True, "1", None, torch.tensor(1), 1 << 63, np.float32(1), Fraction(1)):
        found = both(op, {name: (*values[:-1], bad)})
        assert refused(found) is TypeError, (bad, found)
        assert found[1].startswith(f"{op}: {name} must be "), found[1]
        assert both(op, {name: values}) == expected  # what failed is not remembered for what equals it


def test_an_enumeration_of_ints_is_none():
    assert refused(both("depthwise_conv2d", {"stride": Two.TWO})) is TypeError


@pytest.mark.compiles
def test_symbols_are_taken():
    def function(x, alpha):
        y = ops.weighted_fusion(
            [x, x], None, method="sum", resample=["nearest"] * 2, size=(x.shape[2] // 2, x.shape[3])
        )
        y = ops.depthwise_conv2d(y, FILTERS, None, 1, (x.shape[2] // 4, 1))
        return ops.sigmoid_focal_loss(y, torch.ones_like(y), alpha)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="eager")
    for size, alpha in ((6, 0.25), (8, 0.5), (10, 0.75)):
        x = torch.randn(2, 4, size, size + 1)
        torch.testing.assert_close(compiled(x, alpha), function(x, alpha))
