"""Boxes that are none: match_anchors leaves out those without area, refuses the others; detection_loss refuses their deltas."""

import pytest
import torch

from effdet_fast import ops
from effdet_fast.ops import _arguments, detection_loss, match_anchors, match_anchors_reference
from tests.checks import DTYPES, all_equal
from tests.ops.detection_problem import problem
from tests.ops.matching_problem import RETINANET, each_rule, grid_of_anchors, random_boxes

NAN, INF = float("nan"), float("inf")
EMPTY = {"no width": (10.0, 10.0, 10.0, 40.0), "no height": (5.0, 7.0, 60.0, 7.0), "a point": (30.0, 30.0, 30.0, 30.0)}
BROKEN = {
    "xywh": (90.0, 90.0, 10.0, 10.0),
    "x2 < x1": (50.0, 10.0, 20.0, 40.0),
    "y2 < y1, no width": (50.0, 40.0, 50.0, 10.0),
    "nan": (NAN, 1.0, 2.0, 3.0),
    "inf": (0.0, 0.0, INF, 9.0),
    "both inf": (INF, 0.0, INF, 9.0),
    "too wide": (-3e38, 0.0, 3e38, 9.0),
}


def objects(device="cpu", dtype=torch.float32):
    """Anchors, and two images with four objects and a padding row each."""
    boxes = random_boxes(3, 5)[:2].to(device, dtype)
    labels = torch.tensor([[3, 1, 4, 1, -1], [2, 0, 2, 3, -1]], device=device)
    return grid_of_anchors().to(device, dtype), boxes, labels


@each_rule
@pytest.mark.parametrize("box", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_box_without_area_is_as_a_padding_row(backend, rule, box, dtype):
    anchors, boxes, labels = objects(backend.device, dtype)
    boxes[0, 1] = boxes[1, 3] = torch.tensor(box, dtype=dtype)
    there = labels.clone()
    there[0, 1] = there[1, 3] = -1
    for function in (match_anchors, match_anchors_reference):
        targets = function(anchors, boxes, labels, **rule)
        assert all_equal(targets, function(anchors, boxes, there, **rule))
        assert targets.boxes.isfinite().all()
    counts = torch.tensor([4, 4], device=backend.device)
    assert all_equal(
        match_anchors(anchors, boxes, labels.to(torch.uint8), counts), match_anchors(anchors, boxes, there)
    )


@each_rule
def test_an_image_with_nothing_else_is_background(backend, rule):
    anchors, boxes, labels = objects(backend.device)
    boxes[0] = torch.tensor(EMPTY["no width"])
    targets = match_anchors(anchors, boxes, labels, **rule)
    assert (targets.labels[0] == -1).all() and not targets.boxes[0].any() and targets.num_positives[0] == 0
    assert targets.num_positives[1] > 0


def test_a_box_that_has_no_area_in_the_anchors_precision(backend):
    anchors, boxes, labels = objects(backend.device)
    wide = boxes.double()
    wide[0, 0] = torch.tensor([1e4, 10.0, 1e4 + 1e-6, 40.0], dtype=torch.float64)
    labels[0, 1:] = -1
    assert match_anchors(anchors, wide, labels).num_positives[0] == 0
    assert match_anchors(anchors.double(), wide, labels).num_positives[0] == 1


@pytest.mark.parametrize("box", BROKEN.values(), ids=BROKEN)
def test_a_broken_box_is_named(backend, box):
    anchors, boxes, labels = objects()
    boxes[1, 2] = torch.tensor(box)
    message = (
        r"^match_anchors: gt_boxes\[1, 2\] \(image 1, box 2\) must be finite \(x1, y1, x2, y2\) with x1 <= x2 and y1 <= y2, "
        r"got \[.*\]$"
    )
    for function in (match_anchors, match_anchors_reference):
        with pytest.raises(ValueError, match=message) as raised:
            function(anchors, boxes, labels)
        assert str(raised.value).endswith(f"got {boxes[1, 2].tolist()}")
        function(anchors, boxes, labels, torch.tensor([4, 2]))
        function(anchors, boxes, labels.masked_fill(torch.arange(5) == 2, -1))


def test_padding_may_hold_anything(backend):
    anchors, boxes, labels = objects(backend.device)
    expected = match_anchors(anchors, boxes, labels)
    for value in (NAN, INF, -1.0):
        boxes[:, 4] = value
        assert all_equal(match_anchors(anchors, boxes, labels), expected)


@each_rule
def test_any_boxes_are_matched_as_by_the_reference(native_backend, rule):
    """What a GPU does where values are not looked at, and what effdet's labeler needs: empty and broken boxes take part."""
    anchors, boxes, labels = objects(native_backend.device)
    odd = [*EMPTY.values(), *BROKEN.values()]
    boxes = torch.cat([boxes, torch.tensor([odd, odd[::-1]], device=boxes.device)], 1)
    labels = torch.cat([labels, torch.arange(10, 10 + len(odd), device=boxes.device).expand(2, -1)], 1)
    targets = match_anchors(anchors, boxes, labels, any_box=True, **rule)
    expected = match_anchors_reference(anchors, boxes, labels, any_box=True, **rule)
    assert torch.equal(targets.labels, expected.labels)
    torch.testing.assert_close(targets.boxes, expected.boxes, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert rule["force_match"] == bool((targets.labels >= 10).any()) or rule.get("allow_low_quality_matches", False)


def test_values_that_may_not_be_read_raise_nothing(monkeypatch, backend):
    """As on a GPU without `set_debug`: a box without area is left out all the same, a broken one gives NaN."""
    anchors, boxes, labels = objects(backend.device)
    boxes[0, 0] = torch.tensor(EMPTY["a point"])
    expected = match_anchors(anchors, boxes, labels)
    monkeypatch.setattr(ops.anchor_matching, "may_read_values", lambda x: False)
    assert all_equal(match_anchors(anchors, boxes, labels), expected)
    boxes[1, 0] = torch.tensor(BROKEN["xywh"])
    if backend.name == "reference":
        assert match_anchors(anchors, boxes, labels).boxes[1].isnan().any()
    else:  # the raw op on the CPU sees it too, in a compiled graph for instance
        with pytest.raises(RuntimeError, match=r"gt_boxes\[1, 0\] \(image 1, box 0\) must be finite"):
            match_anchors(anchors, boxes, labels)


@pytest.mark.compiles
def test_compiled(device):
    anchors, boxes, labels = objects(device)
    boxes[0, 0] = torch.tensor(EMPTY["no height"])
    compiled = torch.compile(match_anchors, fullgraph=True, backend="aot_eager")
    assert all_equal(compiled(anchors, boxes, labels, **RETINANET), match_anchors(anchors, boxes, labels, **RETINANET))


def loss(given, **options):
    outputs, labels, deltas, positives, anchors = given
    levels = len(outputs) // 2
    return detection_loss(outputs[:levels], outputs[levels:], labels, deltas, positives, **options, anchors=anchors)


def loss_problem(device="cpu", dtype=torch.float32):
    return problem([(4, 3), (2, 2)], 2, 3, dtype, device)


@pytest.mark.parametrize("box_loss", ["huber", "l1", "smooth_l1", "giou"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_deltas_that_count_must_be_finite(backend, box_loss, value):
    given = loss_problem()
    labels, deltas = given[1:3]
    labels[1, 7], labels[1, 5] = 2, -1
    deltas[1, 7, 0] = value
    with pytest.raises(ValueError) as raised:
        loss(given, num_classes=3, box_loss=box_loss)
    values = deltas[1, 7].tolist()
    assert str(raised.value) == f"detection_loss: box_targets of image 1, anchor 7 must be finite, got {values}"
    # Those of other anchors count for "huber" alone, which asks no label.
    deltas[1, 7] = 0
    deltas[1, 5, 0] = value
    if box_loss == "huber":
        with pytest.raises(ValueError, match="box_targets of image 1, anchor 5 must be finite"):
            loss(given, num_classes=3, box_loss=box_loss)
    else:
        assert all(x.isfinite() for x in loss(given, num_classes=3, box_loss=box_loss))


def test_deltas_of_each_level_are_named_by_their_anchor(backend):
    outputs, labels, deltas, positives, anchors = loss_problem()
    deltas[2, 25, 0] = NAN
    first, second = deltas.split([24, 8], 1)
    per_level = [first.unflatten(1, (4, 3, 2)).flatten(3), second.unflatten(1, (2, 2, 2)).flatten(3)]
    with pytest.raises(ValueError, match="box_targets of image 2, anchor 25 must be finite"):
        loss((outputs, labels, per_level, positives, anchors), num_classes=3)


def test_anchors_that_giou_decodes_with_must_be_finite(backend):
    given = loss_problem()
    labels, anchors = given[1], given[4]
    labels[:, 9], labels[2, 9] = -1, 1
    anchors[9, 1] = NAN
    with pytest.raises(ValueError, match=r"anchors\[9\], with an object in image 2, must be finite, got \[.*nan.*\]"):
        loss(given, num_classes=3, box_loss="giou")
    assert all(x.isfinite() for x in loss(given, num_classes=3, box_loss="l1"))
    labels[2, 9] = -2
    assert all(x.isfinite() for x in loss(given, num_classes=3, box_loss="giou"))


@pytest.mark.cuda
def test_a_gpu_is_asked_only_in_debug_mode():
    anchors, boxes, labels = objects("cuda")
    boxes[1, 2] = torch.tensor(BROKEN["nan"])
    given = loss_problem("cuda")
    given[2][1, 7, 2] = NAN
    match_anchors(anchors, boxes, labels)
    loss(given, num_classes=3)
    _arguments.set_debug(True)
    try:
        with pytest.raises(ValueError, match="image 1, box 2"):
            match_anchors(anchors, boxes, labels)
        with pytest.raises(ValueError, match="image 1, anchor 7"):
            loss(given, num_classes=3)
    finally:
        _arguments.set_debug(False)
