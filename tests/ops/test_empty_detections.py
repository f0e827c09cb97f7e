"""decode_detections(drop_empty=True): boxes without area take no part, everything else is as before."""

import pytest
import torch

from effdet_fast import ops
from effdet_fast.ops.decode_detections import decode_candidates_reference
from tests.checks import all_equal, captured
from tests.ops.head_outputs import heads

NAN = float("nan")
# Three quarters of the anchors lie beside what is clipped to.
CLIP = torch.tensor([[60.0, 30.0], [40.0, 70.0]])


def detect(inputs, clip=CLIP, **options):
    options = {"num_classes": 3, "max_candidates": 150, "iou_threshold": 0.5, **options}
    return ops.decode_detections(*inputs, clip_sizes=clip.to(inputs[2]), **options)


def without_empty(found, max_detections):
    """The first rows of each image that have an area, from detections without a limit."""
    kept = (found.boxes[..., 2:] > found.boxes[..., :2]).all(-1) | found.boxes.isnan().any(-1)
    kept &= found.indices >= 0
    images = []
    for image in range(len(kept)):
        rows = kept[image].nonzero().flatten()[:max_detections]
        images.append([x[image][rows] for x in found[:4]])
    return images


@pytest.mark.parametrize("per_level", [False, True])
@pytest.mark.parametrize("method", ["hard", "gaussian", "linear"])
@pytest.mark.parametrize("score_threshold", [None, 0.3])
def test_others_take_their_places(backend, method, score_threshold, per_level):
    inputs = heads(device=backend.device)
    options = {"method": method, "score_threshold": score_threshold, "candidates_per_level": per_level}
    every = detect(inputs, max_detections=300, **options)
    for max_detections in (5, 20, 300):
        found = detect(inputs, max_detections=max_detections, drop_empty=True, **options)
        for image, expected in enumerate(without_empty(every, max_detections)):
            count = int(found.counts[image])
            assert count == len(expected[0]) > 0
            assert all_equal([x[image, :count] for x in found[:4]], expected)
            assert not found.boxes[image, count:].any() and not found.scores[image, count:].any()
            assert (found.labels[image, count:] == -1).all() and (found.indices[image, count:] == -1).all()
    assert not torch.equal(every.counts, found.counts)  # some were dropped


def test_more_detections_than_one_block_finds(backend):
    """From 1024 on the kernels go through the classes at the same time."""
    inputs = heads(1, 40, 3, [(12, 12)], device=backend.device)
    options = {"num_classes": 40, "max_candidates": 3000, "iou_threshold": 0.7}
    clip = CLIP[:1]
    every = detect(inputs, clip, max_detections=3000, **options)
    found = detect(inputs, clip, max_detections=1100, drop_empty=True, **options)
    (expected,) = without_empty(every, 1100)
    count = int(found.counts[0])
    assert count == len(expected[0])
    assert all_equal([x[0, :count] for x in found[:4]], expected)


def test_nothing_is_left(backend):
    inputs = heads(device=backend.device)
    for options in ({}, {"score_threshold": 0.1}, {"method": "linear"}):
        found = detect(inputs, torch.zeros(2, 2), drop_empty=True, max_detections=7, **options)
        assert not found.counts.any() and not found.boxes.any() and not found.scores.any()
        assert (found.labels == -1).all() and (found.indices == -1).all()


def test_without_an_empty_box_nothing_changes(backend):
    inputs = heads(device=backend.device)
    for options in ({}, {"score_threshold": 0.4}, {"method": "gaussian"}):
        before = ops.decode_detections(*inputs, num_classes=3, **options)
        after = ops.decode_detections(*inputs, num_classes=3, drop_empty=True, **options)
        assert all_equal(after, before)


def test_nan_scores_and_boxes_are_as_before(backend):
    cls_outputs, box_outputs, anchors = inputs = heads(device=backend.device)
    cls_outputs[0][0, 0, 0, 0] = NAN
    box_outputs[0][1, 0, 2, 2] = NAN
    cls_outputs[0][1, :3, 2, 2] = 9.0
    before = ops.decode_detections(*inputs, num_classes=3)
    after = ops.decode_detections(*inputs, num_classes=3, drop_empty=True)
    assert before.scores[0, 0].isnan() and before.boxes[1, 0].isnan().any()
    assert all(torch.allclose(x, y, rtol=0, atol=0, equal_nan=True) for x, y in zip(after, before, strict=True))


def test_float64_and_half_precision(backend):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        inputs = heads(dtype=dtype, device=backend.device)
        found = detect(inputs, max_detections=20, drop_empty=True)
        (first, second) = without_empty(detect(inputs, max_detections=300), 20)
        assert torch.equal(found.indices[0, : len(first[3])], first[3])
        assert torch.equal(found.scores[1, : len(second[1])], second[1])
        assert found.boxes.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.compiles
@pytest.mark.parametrize("options", [{}, {"score_threshold": 0.5}, {"method": "gaussian"}])
def test_compiled(device, options):
    inputs = heads(device=device)
    compiled = torch.compile(detect, fullgraph=True, backend="aot_eager")
    options = {**options, "drop_empty": True}
    assert all_equal(compiled(inputs, **options), detect(inputs, **options))


def test_the_case_is_one():
    boxes = decode_candidates_reference(*heads(), CLIP, 3, 150, "effdet")[0]
    share = (boxes[..., 2:] <= boxes[..., :2]).any(-1).float().mean()
    assert 0.3 < share < 0.95


@pytest.mark.cuda
def test_never_waits_and_can_be_captured():
    inputs = heads(device="cuda")
    clip = CLIP.cuda()
    graph, found = captured(lambda: detect(inputs, clip, drop_empty=True))
    clip.copy_(clip.flip(0))
    graph.replay()
    assert all_equal(found, detect(inputs, clip, drop_empty=True))
