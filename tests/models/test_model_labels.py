"""Anchors, box code and label assignment, against effdet and against slow obvious oracles."""

from __future__ import annotations

import pytest
import torch
from effdet.anchors import AnchorLabeler, Anchors
from hypothesis import given, settings
from hypothesis import strategies as st

from effdet_fast.models import create_model, list_models, matching, model_config
from effdet_fast.models.anchors import AnchorCache, generate_anchors
from effdet_fast.models.box_coder import decode_boxes, encode_boxes
from effdet_fast.models.config import EfficientDetConfig
from effdet_fast.models.matching import match_anchors, pairwise_iou
from tests.models.effdet_models import effdet, random_objects


def peer_anchors(config: EfficientDetConfig) -> Anchors:
    peer = effdet.get_efficientdet_config(f"tf_{config.name}")
    peer.image_size = config.image_size
    return Anchors.from_config(peer)


@pytest.mark.parametrize("name", list_models())
def test_anchors_are_effdets(name):
    config = model_config(name)
    assert torch.equal(generate_anchors(config)[:, [1, 0, 3, 2]], peer_anchors(config).boxes)


@pytest.mark.parametrize("size", [(64, 96), (100, 70), (333, 511)])
def test_anchors_of_odd_sizes_are_effdets(size):
    config = create_model("efficientdet_lite0", 1, image_size=size).config
    torch.testing.assert_close(generate_anchors(config)[:, [1, 0, 3, 2]], peer_anchors(config).boxes, rtol=0, atol=1e-4)


def test_anchors_stay_exact_in_a_half_precision_model():
    model = create_model("efficientdet_lite0", 1, image_size=64)
    exact = model.anchors().clone()
    assert torch.equal(model.bfloat16().anchors(), exact)
    assert not any("anchor" in key for key in model.state_dict())


def test_one_copy_of_the_anchors_per_device():
    cache = AnchorCache(model_config("efficientdet_lite0"))
    assert cache.boxes(torch.device("cpu")) is cache.boxes(torch.device("cpu"))
    assert sum(cache.counts) == len(cache.boxes(torch.device("cpu")))


coordinates = st.floats(-1000, 1000, width=32)
sides = st.floats(0.5, 1000, width=32)


@settings(max_examples=60, deadline=None)
@given(st.tuples(coordinates, coordinates, sides, sides), st.tuples(coordinates, coordinates, sides, sides))
def test_decode_inverts_encode(box, anchor):
    box, anchor = (torch.tensor([x, y, x + w, y + h], dtype=torch.float64) for x, y, w, h in (box, anchor))
    torch.testing.assert_close(decode_boxes(encode_boxes(box, anchor), anchor), box, rtol=1e-5, atol=1e-3)


def test_code_by_hand():
    anchor = torch.tensor([0.0, 0.0, 10.0, 20.0])
    box = torch.tensor([5.0, 10.0, 25.0, 20.0])
    expected = [(15 - 10) / 20, (15 - 5) / 10, torch.tensor(10 / 20).log(), torch.tensor(20 / 10).log()]
    torch.testing.assert_close(encode_boxes(box, anchor), torch.tensor(expected))


def test_code_of_an_empty_box_is_finite():
    anchor = torch.tensor([0.0, 0.0, 10.0, 10.0])
    assert torch.isfinite(encode_boxes(torch.tensor([3.0, 3.0, 3.0, 3.0]), anchor)).all()


def slow_matches(anchors, boxes, labels, threshold):
    """One image, one anchor at a time."""
    valid = [index for index in range(len(labels)) if labels[index] >= 0]
    result = []
    for anchor in anchors:
        best, match = 0.0, -1
        for index in valid:
            iou = slow_iou(anchor, boxes[index])
            if iou > best:
                best, match = iou, index
        result.append(match if best >= threshold else -1)
    for index in reversed(valid):
        ious = [slow_iou(anchor, boxes[index]) for anchor in anchors]
        result[ious.index(max(ious))] = index
    return result


def slow_iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    inter = width * height
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


grid_box = st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 4), st.integers(0, 4))


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([1, 6, 12, 1 << 16]),
    st.lists(grid_box, min_size=1, max_size=8),
    st.lists(st.tuples(grid_box, st.integers(-1, 2)), min_size=0, max_size=6),
)
def test_matching_equals_a_slow_oracle(piece, anchor_cells, objects):
    """Boxes on a small grid, so that ties, equal boxes, shared best anchors and empty boxes are common."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "CPU_PIECE", piece)
        check_against_slow_oracle(anchor_cells, objects)


def check_against_slow_oracle(anchor_cells, objects):
    anchors = torch.tensor([[x, y, x + w + 1, y + h + 1] for x, y, w, h in anchor_cells], dtype=torch.float32)
    boxes = torch.tensor([[x, y, x + w, y + h] for (x, y, w, h), _ in objects], dtype=torch.float32).reshape(1, -1, 4)
    labels = torch.tensor([label for _, label in objects], dtype=torch.int64).reshape(1, -1)
    targets = match_anchors(anchors, boxes, labels, 0.5)
    # The oracle must see the same float32 quotients at the threshold: whole numbers give exact ones at 1/2.
    expected = slow_matches(anchors.tolist(), boxes[0].tolist(), labels[0].tolist(), 0.5)
    assert targets.labels[0].tolist() == [-1 if match < 0 else int(labels[0, match]) for match in expected]
    assert targets.num_positives.tolist() == [sum(match >= 0 for match in expected)]
    for anchor, code, match in zip(anchors, targets.boxes[0], expected, strict=True):
        reference = torch.zeros(4) if match < 0 else encode_boxes(boxes[0, match], anchor)
        torch.testing.assert_close(code, reference)


def test_first_object_wins_a_shared_best_anchor():
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [100.0, 100.0, 110.0, 110.0]])
    boxes = torch.tensor([[[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 3.0, 3.0], [0.0, 0.0, 4.0, 4.0]]])
    targets = match_anchors(anchors, boxes, torch.tensor([[-1, 5, 6]]))
    assert targets.labels.tolist() == [[5, -1]]


def test_a_forced_match_takes_the_anchor_from_a_better_one():
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 0.0, 11.0, 10.0]])
    boxes = torch.tensor([[[0.0, 0.0, 2.0, 10.0], [0.0, 0.0, 10.0, 10.0]]])
    targets = match_anchors(anchors, boxes, torch.tensor([[7, 8]]))
    assert targets.labels.tolist() == [[7, 8]]


@pytest.mark.parametrize("size", [(128, 128), (136, 200)])
def test_labels_are_effdets(size):
    config = create_model("efficientdet_lite0", 20, image_size=size).config
    gt_boxes, gt_labels = random_objects(4, 25, size, 20, seed=5)
    targets = match_anchors(generate_anchors(config), gt_boxes, gt_labels)
    labeler = AnchorLabeler(peer_anchors(config), 20)
    for image in range(4):
        keep = gt_labels[image] >= 0
        cls, box, positives = labeler.label_anchors(gt_boxes[image][keep][:, [1, 0, 3, 2]], gt_labels[image][keep] + 1)
        assert torch.equal(targets.labels[image], torch.cat([level.flatten() for level in cls]))
        torch.testing.assert_close(targets.boxes[image], torch.cat([level.reshape(-1, 4) for level in box]))
        assert targets.num_positives[image] == positives
    assert (targets.num_positives > 0).tolist() == [False, True, True, True]


def test_what_padding_rows_hold_does_not_matter():
    config = model_config("efficientdet_lite0")
    anchors = generate_anchors(config)
    gt_boxes, gt_labels = random_objects(3, 6, (320, 320), 4)
    expected = match_anchors(anchors, gt_boxes, gt_labels)
    gt_boxes[gt_labels < 0] = float("nan")
    for actual, reference in zip(match_anchors(anchors, gt_boxes, gt_labels), expected, strict=True):
        assert torch.equal(actual, reference)


def test_iou_of_empty_boxes_is_zero():
    boxes = torch.tensor([[3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 4.0, 4.0]])
    assert pairwise_iou(boxes, boxes).tolist() == [[0.0, 0.0], [0.0, 1.0]]
