"""match_anchors on every backend: against a slow oracle, against its reference, and against effdet and torchvision."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.ops import box_iou

from effdet_fast import ops
from effdet_fast.ops import AnchorTargets, match_anchors, match_anchors_reference
from tests.conftest import enter
from tests.ops.matching_problem import (
    RETINANET,
    RULES,
    assert_targets,
    each_rule,
    grid_of_anchors,
    random_boxes,
    random_objects,
)

NAN, INF = float("nan"), float("inf")


def slow_iou(a, b):
    """One pair, each operation rounded to float32 as PyTorch rounds it; 0 where it is not a number."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    width, height = (np.maximum(np.minimum(a[i + 2], b[i + 2]) - np.maximum(a[i], b[i]), 0) for i in (0, 1))
    inter = width * height
    iou = inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)
    return iou if iou > 0 else np.float32(0)


def slow_matches(anchors, boxes, labels, pos_iou, neg_iou, force_match, allow_low_quality_matches=False, **_):
    """One image, one anchor at a time: the row each anchor answers for."""
    valid = [i for i, label in enumerate(labels) if label >= 0]
    iou = {i: [slow_iou(anchor, boxes[i]) for anchor in anchors] for i in valid}
    best = [max(valid, key=lambda i: iou[i][a]) if valid else -1 for a in range(len(anchors))]  # the first of equals
    result = []
    for a in range(len(anchors)):
        highest = iou[best[a]][a] if valid else 0
        result.append(best[a] if highest >= np.float32(pos_iou) else -2 if highest >= np.float32(neg_iou) else -1)
    for i in reversed(valid):
        for a in range(len(anchors)):
            if allow_low_quality_matches and iou[i][a] == max(iou[i]):
                result[a] = best[a]
        if force_match:
            result[iou[i].index(max(iou[i]))] = i
    return result


def slow_code(box, anchor, box_coder):
    if box_coder is None:
        return list(box)
    eps = 1e-7 if box_coder == "effdet" else 0.0
    (w, h), (wa, ha) = ((x2 - x1, y2 - y1) for x1, y1, x2, y2 in (box, anchor))
    dx = (box[0] + w / 2 - anchor[0] - wa / 2) / (wa + eps)
    dy = (box[1] + h / 2 - anchor[1] - ha / 2) / (ha + eps)
    dw, dh = (math.log(s / t) if s > 0 and t > 0 else NAN for s, t in ((w + eps, wa + eps), (h + eps, ha + eps)))
    return [dy, dx, dh, dw] if box_coder == "effdet" else [dx, dy, dw, dh]


grid_box = st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(-1, 4), st.integers(0, 4))
special = st.sampled_from([(NAN, 0, 2, 2), (0, 0, NAN, 3), (0, 0, INF, 2), (-INF, 0, INF, 2), (50, 50, 60, 60)])


@pytest.mark.parametrize("name", ["reference", "cpu", "emulated"])
@given(
    anchors=st.lists(grid_box, min_size=1, max_size=70),
    objects=st.lists(st.tuples(grid_box, st.integers(-1, 2)), max_size=6),
    oddity=st.none() | st.tuples(special, st.integers(-1, 2)),
    rule=st.sampled_from(list(RULES.values())),
    thresholds=st.sampled_from([(0.5, 0.5), (0.5, 0.4), (0.7, 1 / 3), (2.0, 0.1)]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_equals_a_slow_oracle(name, anchors, objects, oddity, rule, thresholds):
    """Any boxes on a small grid, so that ties, equal boxes, shared best anchors and empty boxes are common."""
    anchors = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in anchors], dtype=torch.float32)
    rows = [((x, y, x + w, y + h), label) for (x, y, w, h), label in objects] + ([oddity] if oddity else [])
    boxes = torch.tensor([box for box, _ in rows], dtype=torch.float32).reshape(1, -1, 4)
    labels = torch.tensor([label for _, label in rows], dtype=torch.int64).reshape(1, -1)
    rule = {"allow_low_quality_matches": False, **rule, "pos_iou": thresholds[0], "neg_iou": thresholds[1]}
    with np.errstate(all="ignore"):
        matches = slow_matches(anchors.tolist(), boxes[0].tolist(), labels[0].tolist(), **rule)
    backend = enter(name)
    next(backend)
    targets = match_anchors(anchors, boxes, labels, any_box=True, **rule)
    assert next(backend, None) is None
    assert targets.labels[0].tolist() == [match if match < 0 else int(labels[0, match]) for match in matches]
    assert targets.num_positives.tolist() == [sum(match >= 0 for match in matches)]
    for anchor, delta, match in zip(anchors, targets.boxes[0], matches, strict=True):
        if match < 0:
            assert not delta.any()
        elif all(map(math.isfinite, rows[match][0])) and (anchor[2:] > anchor[:2]).all():
            expected = slow_code(boxes[0, match].tolist(), anchor.tolist(), rule["box_coder"])
            positive_sides = (boxes[0, match, 2:] > boxes[0, match, :2]).all()
            assert rule["box_coder"] is None or not positive_sides or torch.isfinite(delta).all()
            known = ~torch.tensor(expected).isnan()
            torch.testing.assert_close(delta[known], torch.tensor(expected)[known], rtol=1e-5, atol=1e-5)


@each_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_its_reference(native_backend, rule, dtype):
    anchors = grid_of_anchors().to(native_backend.device, dtype)
    boxes, labels = random_objects(3, 45, native_backend.device)
    boxes = boxes.to(dtype) + (torch.rand_like(boxes.to(dtype)) if dtype == torch.float64 else 0)
    expected = match_anchors_reference(anchors, boxes, labels, **rule)
    assert_targets(match_anchors(anchors, boxes, labels, **rule), expected)
    assert expected.boxes.dtype == dtype and (expected.labels >= 0).any() and (expected.labels == -1).any()
    assert bool((expected.labels == -2).any()) == (rule["neg_iou"] < rule["pos_iou"])


@each_rule
@pytest.mark.parametrize("seed", range(4))
def test_groups_of_anchors_are_skipped_without_a_trace(rule, seed):
    """At full size, with anchors in no order at all, and with boxes far smaller and far larger than any anchor."""
    torch.manual_seed(seed)
    anchors = grid_of_anchors(512 if seed < 2 else 256)
    if seed % 2:
        anchors = torch.cat([anchors[torch.randperm(len(anchors))], random_boxes(333, size=512)])
    boxes, labels = random_objects(2, 60, size=512)
    boxes[1, :20] = boxes[1, :20] * torch.tensor([1.0, 1.0, 0.0, 0.0]) + boxes[1, :20, :2].repeat(1, 2) * torch.tensor(
        [0.0, 0.0, 1.0, 1.0]
    )
    boxes[1, 20:40, 2:] += 400
    boxes[0, :10] = anchors[torch.randint(len(anchors), (10,))]
    assert_targets(
        match_anchors(anchors, boxes, labels, **rule), match_anchors_reference(anchors, boxes, labels, **rule)
    )


@each_rule
def test_images_with_no_box_one_box_and_2000_in_one_batch(backend, rule):
    anchors = grid_of_anchors(64).to(backend.device)
    boxes, labels = random_objects(4, 2000, backend.device, size=64)
    labels = labels.clamp(min=0)
    counts = torch.tensor([0, 1, 2000, 5], device=backend.device)
    for image, count in enumerate(counts.tolist()):
        boxes[image, count:] = NAN
    targets = match_anchors(anchors, boxes, labels, counts, **rule)
    assert (targets.labels[0] == -1).all() and not targets.boxes[0].any() and targets.num_positives[0] == 0
    for image, count in enumerate(counts.tolist()):
        alone = match_anchors_reference(
            anchors, boxes[image : image + 1, :count], labels[image : image + 1, :count], **rule
        )
        assert_targets(AnchorTargets(*(x[image : image + 1] for x in targets)), alone)
    padded = labels.masked_fill(torch.arange(2000, device=backend.device) >= counts[:, None], -1)
    assert_targets(match_anchors(anchors, boxes, padded, **rule), targets, rtol=0, atol=0)


@each_rule
def test_empty_shapes(backend, rule):
    for batch, max_boxes, count in itertools.product((0, 2), (0, 3), (0, 5)):
        anchors, boxes = torch.zeros(count, 4), torch.zeros(batch, max_boxes, 4)
        labels = torch.full((batch, max_boxes), -1)
        targets = match_anchors(*(x.to(backend.device) for x in (anchors, boxes, labels)), **rule)
        assert [list(x.shape) for x in targets] == [[batch, count], [batch, count, 4], [batch]]
        assert (targets.labels == -1).all() and not targets.boxes.any() and not targets.num_positives.any()


def test_first_object_wins_a_shared_best_anchor(backend):
    anchors = torch.tensor([[0.0, 0, 10, 10], [100, 100, 110, 110]], device=backend.device)
    boxes = torch.tensor([[[0.0, 0, 2, 2], [0, 0, 3, 3], [0, 0, 4, 4]]], device=backend.device)
    targets = match_anchors(anchors, boxes, torch.tensor([[-1, 5, 6]], device=backend.device))
    assert targets.labels.tolist() == [[5, -1]]


def test_a_forced_match_takes_the_anchor_from_a_better_one(backend):
    anchors = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10]], device=backend.device)
    boxes = torch.tensor([[[0.0, 0, 2, 10], [0, 0, 10, 10]]], device=backend.device)
    labels = torch.tensor([[7, 8]], device=backend.device)
    assert match_anchors(anchors, boxes, labels).labels.tolist() == [[7, 8]]
    assert match_anchors(anchors, boxes, labels, force_match=False).labels.tolist() == [[8, 8]]
    low_quality = match_anchors(anchors, boxes, labels, force_match=False, allow_low_quality_matches=True)
    assert low_quality.labels.tolist() == [[8, 8]]


def test_an_object_that_overlaps_no_anchor(backend):
    """It forces the first anchor, or ties with all; every anchor then takes the first object."""
    anchors = torch.tensor([[0.0, 0, 10, 10]] * 40, device=backend.device)
    boxes = torch.tensor([[[900.0, 900, 910, 910], [50, 50, 60, 60]]], device=backend.device)
    labels = torch.tensor([[3, 4]], device=backend.device)
    assert match_anchors(anchors, boxes, labels).labels.tolist() == [[3] + [-1] * 39]
    assert match_anchors(anchors, boxes, labels, **RETINANET).labels.tolist() == [[3] * 40]


def test_labels_are_effdets(backend):
    effdet_anchors = pytest.importorskip("effdet.anchors")
    from effdet import get_efficientdet_config

    config = get_efficientdet_config("tf_efficientdet_d0")
    config.image_size = (128, 128)
    peer_anchors = effdet_anchors.Anchors.from_config(config)
    labeler = effdet_anchors.AnchorLabeler(peer_anchors, 20)
    anchors = peer_anchors.boxes[:, [1, 0, 3, 2]].contiguous()
    boxes, labels = random_objects(4, 30, classes=20)
    boxes[..., 2:] = torch.maximum(boxes[..., 2:], boxes[..., :2] + 1)
    targets = match_anchors(*(x.to(backend.device) for x in (anchors, boxes, labels)))
    for image in range(4):
        there = labels[image] >= 0
        gt = boxes[image][there]
        cls, box, _ = labeler.label_anchors(gt[:, [1, 0, 3, 2]], labels[image][there] + 1)
        # effdet leaves open who gets an anchor that is the best of several.
        wanted, times = ops.anchor_matching.pairwise_iou(gt, anchors).argmax(1).unique(return_counts=True)
        settled = torch.ones(len(anchors), dtype=torch.bool)
        settled[wanted[times > 1]] = False
        assert settled.sum() > len(anchors) - 10
        peer_labels, peer_deltas = torch.cat([c.flatten() for c in cls]), torch.cat([b.reshape(-1, 4) for b in box])
        assert torch.equal(targets.labels[image].cpu()[settled], peer_labels[settled])
        torch.testing.assert_close(targets.boxes[image].cpu()[settled], peer_deltas[settled], rtol=1e-5, atol=1e-5)


def test_labels_are_torchvisions(backend):
    anchors = torch.cat([grid_of_anchors(), torch.tensor([[0.0, 0, 8, 8]] * 3)])  # equal anchors tie
    boxes, labels = random_objects(4, 30)
    boxes[..., 2:] = torch.maximum(boxes[..., 2:], boxes[..., :2] + 1)
    boxes[2, 3] += 1000  # overlaps nothing
    boxes[3, 0] = anchors[-1]
    labels[:, 0], labels[2, 3] = 2, 1
    targets = match_anchors(*(x.to(backend.device) for x in (anchors, boxes, labels)), **RETINANET)
    matcher, coder = Matcher(0.5, 0.4, allow_low_quality_matches=True), BoxCoder((1.0, 1.0, 1.0, 1.0))
    for image in range(4):
        there = labels[image] >= 0
        gt, classes = boxes[image][there], labels[image][there]
        matches = matcher(box_iou(gt, anchors))
        expected = torch.where(matches >= 0, classes[matches.clamp(min=0)], matches)
        deltas = coder.encode_single(gt[matches.clamp(min=0)], anchors)
        deltas = torch.where((matches >= 0)[:, None], deltas, 0)
        assert {-2, -1} < set(expected.tolist()) or image == 2
        one = AnchorTargets(expected[None], deltas[None], (matches >= 0).sum()[None].float())
        assert_targets(AnchorTargets(*(x[image : image + 1] for x in targets)), one)
