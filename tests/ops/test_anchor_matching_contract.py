"""What match_anchors promises besides its targets: dtypes, strides, determinism, compilation, errors, no waiting."""

import pytest
import torch

from effdet_fast.ops import match_anchors, match_anchors_reference
from tests.checks import all_equal, assert_same_in_every_run, captured
from tests.emulation.backend import emulated
from tests.ops.accuracy import guarded
from tests.ops.matching_problem import (
    assert_targets,
    each_rule,
    grid_of_anchors,
    random_boxes,
    random_objects,
)

NAN = float("nan")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("integer", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_half_precision_is_computed_in_float32(backend, dtype, integer):
    anchors, (boxes, labels) = grid_of_anchors(64), random_objects(2, 9, size=64)
    labels, counts = labels.clamp(min=0), torch.tensor([9, 4])
    anchors, boxes, labels, counts = (x.to(backend.device) for x in (anchors, boxes, labels, counts))
    expected = match_anchors(anchors.to(dtype).float(), boxes.to(dtype).float(), labels, counts)
    for autocast in (False, True):
        with torch.autocast(backend.device.type, dtype, enabled=autocast):
            got = match_anchors(anchors.to(dtype), boxes.to(dtype), labels.to(integer), counts.to(integer))
        assert got.boxes.dtype == torch.float32
        assert_targets(got, expected, rtol=0, atol=0)


def test_views(backend):
    """Sliced, transposed, expanded and misaligned inputs, whose surroundings are NaN."""
    anchors, (boxes, labels) = grid_of_anchors(64), random_objects(3, 13, size=64)
    expected = match_anchors_reference(anchors, boxes, labels)
    anchors, boxes, labels = (x.to(backend.device) for x in (anchors, boxes, labels))
    assert_targets(match_anchors(guarded(anchors), guarded(boxes), guarded(labels)), expected)
    wide = torch.full((len(anchors), 2, 6), NAN, device=backend.device)[:, 1, 1:5].copy_(anchors)
    turned = boxes.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert_targets(match_anchors(wide, turned, labels.T.contiguous().T), expected)
    first = match_anchors(anchors, boxes[:1].expand(3, -1, -1), labels[:1].expand(3, -1))
    assert all_equal([x[0] for x in first], [x[2] for x in first]) and torch.equal(
        first.labels[1].cpu(), expected.labels[0]
    )


@pytest.mark.parametrize("seed", [1, 2, 3])
@each_rule
def test_any_order_of_the_threads(seed, rule):
    anchors, (boxes, labels) = grid_of_anchors(64), random_objects(2, 40, size=64)
    with emulated(thread_order_seed=seed):
        targets = match_anchors(anchors, boxes, labels, **rule)
    assert_targets(targets, match_anchors_reference(anchors, boxes, labels, **rule))


@each_rule
def test_the_same_in_every_run_and_for_any_thread_count(native_backend, rule):
    emulates = native_backend.name == "emulated"
    anchors = grid_of_anchors(64 if emulates else 512).to(native_backend.device)
    shape, size = ((2, 20), 64) if emulates else ((5, 30), 512)
    boxes, labels = random_objects(*shape, native_backend.device, size=size)
    assert_same_in_every_run(lambda: match_anchors(anchors, boxes, labels, **rule), 3 if emulates else 20)


@pytest.mark.parametrize("force", [0, 1, 2])
def test_raw_op(device, force):
    anchors, (boxes, labels) = grid_of_anchors(64).to(device), random_objects(2, 9, device, size=64)
    op = torch.ops.effdet_fast.match_anchors.default
    for counts, coder in ((None, 0), (torch.tensor([9, 3], device=device), 1)):
        torch.library.opcheck(op, (anchors, boxes, labels, counts, 0.5, 0.4, force, coder, False))
    torch.library.opcheck(op, (anchors, boxes[:, :0], labels[:, :0], None, 0.5, 0.4, force, 2, True))
    with pytest.raises(RuntimeError, match="boxes must be contiguous"):
        op(anchors, boxes.double(), labels, None, 0.5, 0.4, force, 1, False)
    with pytest.raises(RuntimeError, match="labels must be contiguous int64"):
        op(anchors, boxes, labels.int(), None, 0.5, 0.4, force, 1, False)
    with pytest.raises(RuntimeError, match="counts must be contiguous int64"):
        op(anchors, boxes, labels, labels[:, 0].int(), 0.5, 0.4, force, 1, False)


@pytest.mark.compiles
@each_rule
def test_compiles_without_a_break(device, rule):
    anchors, (boxes, labels) = grid_of_anchors(64).to(device), random_objects(2, 9, device, size=64)
    counts = torch.tensor([9, 2], device=device)
    compiled = torch.compile(lambda *x: match_anchors(*x, **rule), fullgraph=True)
    for arguments in ((anchors, boxes, labels), (anchors, boxes, labels, counts)):
        assert_targets(compiled(*arguments), match_anchors(*arguments, **rule), rtol=0, atol=0)


def test_fake_tensors():
    with torch._subclasses.FakeTensorMode():
        got = match_anchors(torch.empty(9, 4), torch.empty(2, 5, 4), torch.empty(2, 5).int())
    assert [list(x.shape) for x in got] == [[2, 9], [2, 9, 4], [2]]
    assert [x.dtype for x in got] == [torch.int64, torch.float32, torch.float32]


def test_inputs_that_require_a_gradient(backend):
    anchors, (boxes, labels) = grid_of_anchors(64), random_objects(2, 9, size=64)
    anchors, boxes, labels = (x.to(backend.device) for x in (anchors, boxes, labels))
    targets = match_anchors(anchors.requires_grad_(), boxes.requires_grad_(), labels)
    assert not targets.boxes.requires_grad and not targets.num_positives.requires_grad


ANCHORS, BOXES, LABELS = torch.zeros(6, 4), torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"anchors": [1.0]}, TypeError, "anchors must be a Tensor, got list"),
        ({"anchors": ANCHORS.int()}, TypeError, "anchors must be float16, bfloat16, float32 or float64, got int32"),
        ({"anchors": ANCHORS[:, :3]}, ValueError, "anchors must have shape [A, 4], got [6, 3]"),
        ({"gt_boxes": BOXES.long()}, TypeError, "gt_boxes must be float16, bfloat16, float32 or float64, got int64"),
        ({"gt_boxes": BOXES[0]}, ValueError, "gt_boxes must have shape [B, M, 4], got [3, 4]"),
        ({"gt_boxes": BOXES.to("meta")}, ValueError, "gt_boxes must be on the device of anchors, cpu, got meta"),
        ({"gt_labels": LABELS.float()}, TypeError, "gt_labels must be an integer tensor, got float32"),
        ({"gt_labels": LABELS[:, :2]}, ValueError, "gt_labels must have shape [2, 3], got [2, 2]"),
        ({"gt_labels": LABELS.to("meta")}, ValueError, "gt_labels must be on the device of anchors, cpu, got meta"),
        ({"gt_counts": torch.zeros(2)}, TypeError, "gt_counts must be an integer tensor, got float32"),
        ({"gt_counts": LABELS[0]}, ValueError, "gt_counts must have shape [2], got [3]"),
        ({"gt_counts": torch.tensor([3, 4])}, ValueError, "gt_counts must be in [0, 3], got 4"),
        ({"gt_counts": torch.tensor([-1, 3])}, ValueError, "gt_counts must be in [0, 3], got -1"),
        (
            {"neg_iou": 0.6},
            ValueError,
            "thresholds must be 0 < neg_iou <= pos_iou, got neg_iou=0.6, pos_iou=0.5",
        ),
        (
            {"neg_iou": 0.0},
            ValueError,
            "thresholds must be 0 < neg_iou <= pos_iou, got neg_iou=0.0, pos_iou=0.5",
        ),
        (
            {"pos_iou": NAN},
            ValueError,
            "thresholds must be 0 < neg_iou <= pos_iou, got neg_iou=0.5, pos_iou=nan",
        ),
        (
            {"allow_low_quality_matches": True},
            ValueError,
            "force_match and allow_low_quality_matches exclude each other, got both",
        ),
        ({"box_coder": "yolo"}, ValueError, "box_coder must be one of None, 'effdet', 'torchvision', got 'yolo'"),
    ],
)
def test_errors(changed, error, message):
    with pytest.raises(error) as raised:
        match_anchors(**{"anchors": ANCHORS, "gt_boxes": BOXES, "gt_labels": LABELS, **changed})
    assert str(raised.value) == f"match_anchors: {message}"


@pytest.mark.cuda
@each_rule
def test_never_waits_and_can_be_captured(rule):
    anchors, (boxes, labels) = grid_of_anchors(512).cuda(), random_objects(4, 50, "cuda", size=512)
    graph, found = captured(lambda: match_anchors(anchors, boxes, labels, **rule))
    boxes.copy_(random_boxes(4, 50, size=512))
    graph.replay()
    assert_targets(found, match_anchors_reference(anchors, boxes, labels, **rule))


@pytest.mark.cuda
def test_more_images_than_a_grid_has_rows():
    anchors, (boxes, labels) = grid_of_anchors(64)[:5].cuda(), random_objects(1, 3, "cuda", size=64)
    targets = match_anchors(anchors, boxes.expand(70000, -1, -1), labels.expand(70000, -1))
    expected = match_anchors_reference(anchors, boxes, labels)
    assert (targets.labels == expected.labels).all() and (targets.num_positives == expected.num_positives).all()
