"""The ways through non-maximum suppression, which the shapes choose: each at its borders, with ties, odd values and NaN scores.

A set of up to 512 boxes is one window of a block, of up to 1024 two; a larger one is a chain of tiles. The padded form goes
through an image window by window, or class by class where it may keep more than 1024.
"""

import re
from pathlib import Path

import pytest
import torch

from effdet_fast import ops
from tests.checks import DTYPES, all_equal, captured
from tests.emulation.backend import emulated
from tests.ops import test_nms, test_nms_padded
from tests.ops.test_nms import NAN, SPECIAL_VALUES, grid_boxes, random_boxes

CHAIN = 1100  # boxes that make a chain of tiles


def scored(backend, *shape, classes, ties=40):
    """Scores with ties, and classes."""
    scores = (torch.randint(0, ties, shape) / ties).to(backend.device)
    return scores, torch.randint(0, classes, shape, device=backend.device)


@pytest.mark.parametrize("classes", [1, 90])
@pytest.mark.parametrize("n", [511, 513, 1024, 1025, CHAIN])
def test_sets_at_the_borders(backend, n, classes):
    boxes = (grid_boxes(n) * torch.rand(n, 1).round(decimals=1)).to(backend.device)
    test_nms.assert_like_peer(boxes, *scored(backend, n, classes=classes), 1 / 3)


@pytest.mark.parametrize("max_detections", [1, 100, 1024, 1025])
@pytest.mark.parametrize("classes", [1, 90])
def test_batches_at_the_borders(backend, classes, max_detections):
    boxes = random_boxes(2, CHAIN, size=30.0).to(backend.device)
    boxes[0, ::3] = boxes[0, 0].clone()  # one box, many times
    scores, labels = scored(backend, 2, CHAIN, classes=classes)
    for score_threshold in (None, 0.15):
        options = {"max_detections": max_detections, "score_threshold": score_threshold}
        test_nms_padded.assert_like_peer(boxes, scores, labels, 0.3, **options)


@pytest.mark.parametrize("n", [600, CHAIN])
@pytest.mark.parametrize("iou_threshold", [0.5, 0.0, -1.0])
def test_special_coordinates(backend, n, iou_threshold):
    odd = torch.tensor(SPECIAL_VALUES)[torch.randint(0, len(SPECIAL_VALUES), (n // 2, 4))]
    boxes = torch.cat([odd, grid_boxes(n - len(odd))])[torch.randperm(n)].to(backend.device)
    scores, labels = scored(backend, n, classes=3)
    test_nms.assert_like_peer(boxes, scores, labels, iou_threshold)
    test_nms_padded.assert_like_peer(boxes[None], scores[None], labels[None], iou_threshold, max_detections=n)


@pytest.mark.parametrize("classes", [1, 90])
def test_nan_scores(backend, classes):
    """They come first, in every window and tile; with a threshold they neither count nor suppress."""
    boxes = random_boxes(1, 2200, extent=2000.0).to(backend.device)
    scores, labels = scored(backend, 1, 2200, classes=classes)
    scores[0, ::2] = NAN
    for max_detections in (30, 1040):
        for score_threshold in (None, -1.0):
            options = {"max_detections": max_detections, "score_threshold": score_threshold}
            got = test_nms_padded.assert_like_peer(boxes, scores, labels, 0.4, **options)
            assert got.scores[0, 0].isnan() == (score_threshold is None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_and_dtypes_of_a_chain(backend, dtype):
    source, (scores, labels) = grid_boxes(CHAIN).to(backend.device, dtype), scored(backend, CHAIN, classes=5)
    misaligned = torch.full((4 * CHAIN + 5,), NAN, device=backend.device, dtype=dtype)[1:-4].view(CHAIN, 4)
    test_nms.assert_like_peer(misaligned.copy_(source), scores.to(dtype), labels, 0.3)


def test_a_class_that_keeps_enough_stops_early(native_backend):
    """Of nothing but kept boxes the chain stops in the tile that has the last one wanted; what is wanted is all there."""
    boxes = random_boxes(1, 2000, size=1.0, extent=9000.0).to(native_backend.device)
    labels = (torch.arange(2000, device=native_backend.device) >= 100).long()[None]
    for max_kept in (1, 64, 65, 700, 2000):
        keep = torch.ops.effdet_fast.nms(boxes, labels, 0.5, max_kept)[0]
        small, large = keep[:100], keep[100:]
        assert small[:max_kept].all() and large[:max_kept].all()
        assert large.sum() < max_kept + 64
    scores = torch.linspace(1, 0, 2000, device=native_backend.device)[None]
    test_nms_padded.assert_like_peer(boxes, scores, labels, 0.5, max_detections=1200)


def test_images_of_a_batch_do_not_mix(native_backend):
    """The same boxes and classes in each image: suppressed within one, and only there."""
    for n in (70, CHAIN):
        boxes = grid_boxes(1, n).expand(3, -1, -1).contiguous().to(native_backend.device)
        labels = torch.randint(0, 3, (1, n)).sort()[0].expand(3, -1).contiguous().to(native_backend.device)
        keep = torch.ops.effdet_fast.nms(boxes, labels, 0.4, n)
        single = torch.ops.effdet_fast.nms(boxes[:1], labels[:1], 0.4, n)
        assert torch.equal(keep, single.expand(3, -1)) and not keep.all()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_any_order_of_the_threads(seed):
    boxes, scores, labels = random_boxes(2, CHAIN), torch.rand(2, CHAIN), torch.randint(0, 3, (2, CHAIN))
    with emulated(thread_order_seed=seed):
        test_nms.assert_like_peer(boxes[0], scores[0], labels[0], 0.3)
        test_nms.assert_like_peer(boxes[0, :600], scores[0, :600], labels[0, :600], 0.3)
        for max_detections in (150, CHAIN):
            test_nms_padded.assert_like_peer(boxes, scores, labels, 0.3, max_detections=max_detections)


@pytest.mark.compiles
def test_by_class_compiled(device):
    detect = torch.compile(ops.batched_nms_padded, fullgraph=True, backend="aot_eager")
    boxes, scores, labels = (
        x.to(device) for x in (random_boxes(1, CHAIN), torch.rand(1, CHAIN), torch.randint(0, 3, (1, CHAIN)))
    )
    options = {"max_detections": CHAIN, "score_threshold": 0.1}
    expected = ops.batched_nms_padded(boxes, scores, labels, 0.4, **options)
    assert all_equal(detect(boxes, scores, labels, 0.4, **options), expected)


PEAK = Path("/proc/self/clear_refs")


@pytest.mark.skipif(not PEAK.exists(), reason="the peak of memory is read from /proc")
def test_a_hundred_thousand_boxes_need_no_mask_of_all_pairs():
    """It would hold 1.25 GB."""

    def mebibytes(what):
        return int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    boxes, scores = random_boxes(100_000, extent=1000.0), torch.rand(100_000)
    PEAK.write_text("5")  # the peak starts anew
    before = mebibytes("VmRSS")
    kept = ops.nms(boxes, scores, 0.3)
    assert mebibytes("VmHWM") - before < 64
    assert 1000 < len(kept) < 100_000


@pytest.mark.cuda
def test_by_class_never_waits_and_can_be_captured():
    boxes, scores, labels = (
        x.cuda() for x in (random_boxes(4, 3000), torch.rand(4, 3000), torch.randint(0, 5, (4, 3000)))
    )
    options = {"max_detections": 2000, "score_threshold": 0.1}
    graph, found = captured(lambda: ops.batched_nms_padded(boxes, scores, labels, 0.5, **options))
    scores.copy_(torch.rand(4, 3000))
    graph.replay()
    assert all_equal(found, ops.batched_nms_padded(boxes, scores, labels, 0.5, **options))
