"""Random problems for match_anchors, the rules of those who match, and how targets compare."""

import pytest
import torch

from effdet_fast.models import model_config
from effdet_fast.models.anchors import generate_anchors
from effdet_fast.ops import AnchorTargets

EFFDET = {"pos_iou": 0.5, "neg_iou": 0.5, "force_match": True, "box_coder": "effdet"}
RETINANET = {
    "pos_iou": 0.5,
    "neg_iou": 0.4,
    "force_match": False,
    "allow_low_quality_matches": True,
    "box_coder": "torchvision",
}
THRESHOLDS_ONLY = {"pos_iou": 0.6, "neg_iou": 0.3, "force_match": False, "box_coder": None}
RULES = {"effdet": EFFDET, "retinanet": RETINANET, "thresholds": THRESHOLDS_ONLY}
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def assert_targets(actual: AnchorTargets, expected: AnchorTargets, rtol=1e-5, atol=1e-5):
    assert isinstance(actual, AnchorTargets)
    assert actual.labels.dtype == torch.int64 and actual.num_positives.dtype == torch.float32
    assert all(x.is_contiguous() for x in actual)
    assert torch.equal(actual.labels.cpu(), expected.labels.cpu())
    assert torch.equal(actual.num_positives.cpu(), expected.num_positives.cpu())
    torch.testing.assert_close(actual.boxes.cpu(), expected.boxes.cpu(), rtol=rtol, atol=atol, equal_nan=True)


def grid_of_anchors(size=128):
    """The anchors of an EfficientDet for small images: all levels, ties among the aspects of square cells."""
    config = model_config("efficientdet_d0")
    return generate_anchors(config.__class__(**{**config.__dict__, "image_size": (size, size)}))


def random_boxes(*shape, size=128):
    """Of all sizes and aspects; some reach over the edge; in the last image some are empty."""
    center = torch.rand(*shape, 2) * size
    half = torch.exp(torch.rand(*shape, 2) * 5 - 1)
    boxes = torch.cat([center - half, center + half], -1)
    odd = torch.rand(shape)
    odd[:-1] = 1
    boxes[..., 2] = torch.where(odd < 0.03, boxes[..., 0], boxes[..., 2])
    return boxes


def random_objects(batch, max_boxes, device="cpu", size=128, classes=7):
    return random_boxes(batch, max_boxes, size=size).to(device), torch.randint(
        -1, classes, (batch, max_boxes), device=device
    )
