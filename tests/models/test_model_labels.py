"""Anchors, box deltas and the labels made from them, against effdet."""

from __future__ import annotations

import pytest
import torch
from effdet.anchors import AnchorLabeler, Anchors
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import _default_anchorgen

from effdet_fast.models import create_model, list_models, model_config
from effdet_fast.models.anchors import AnchorCache, feature_sizes, generate_anchors
from effdet_fast.models.config import DetectorConfig
from effdet_fast.ops import match_anchors
from effdet_fast.ops._boxes import decode_boxes, encode_boxes
from tests.generated_data import random_objects
from tests.models.effdet_models import effdet, peer_name


def peer_anchors(config: DetectorConfig) -> Anchors:
    peer = effdet.get_efficientdet_config(peer_name(config.name))
    peer.image_size = config.image_size
    return Anchors.from_config(peer)


@pytest.mark.parametrize("name", [name for name in list_models() if name.startswith("efficientdet")])
def test_anchors_are_effdets(name):
    config = model_config(name)
    assert torch.equal(generate_anchors(config)[:, [1, 0, 3, 2]], peer_anchors(config).boxes)


@pytest.mark.parametrize("size", [(64, 96), (100, 70), (333, 511)])
def test_anchors_of_odd_sizes_are_effdets(size):
    config = create_model("efficientdet_lite0", 1, image_size=size).config
    torch.testing.assert_close(generate_anchors(config)[:, [1, 0, 3, 2]], peer_anchors(config).boxes, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [(800, 800), (128, 160), (101, 333)])
def test_retinanet_anchors_are_torchvisions(size):
    config = model_config("retinanet_resnet50_fpn", image_size=size)
    images = torch.zeros(1, 3, *size)
    maps = [torch.zeros(1, 1, *shape) for shape in feature_sizes(size, 3, 7)]
    expected = _default_anchorgen()(ImageList(images, [size]), maps)[0]
    assert torch.equal(generate_anchors(config), expected)


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
