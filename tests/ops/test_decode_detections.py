"""decode_detections: candidates as of a stable sort, boxes as of the formula, and then batched_nms_padded."""

import pytest
import torch
import torchvision

from effdet_fast import ops
from effdet_fast.ops.decode_detections import decode_candidates_reference
from tests.checks import DTYPES, LAYOUTS, all_equal
from tests.conftest import enter
from tests.ops.head_outputs import assert_same_candidates, candidates, heads, large_heads
from tests.ops.test_nms import INF, NAN


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_candidates_are_those_of_a_stable_sort(native_backend, dtype, layout):
    inputs = heads(dtype=dtype, layout=layout, device=native_backend.device)
    total = inputs[2].shape[0] * 3
    for count in (1, 50, total - 1, total, total + 9):
        assert_same_candidates(*inputs, 3, count)


@pytest.mark.parametrize(
    ("batch", "classes", "per_cell", "sizes"),
    [
        (1, 1, 1, [(1, 1)]),
        (3, 7, 3, [(1, 9), (13, 1)]),
        (2, 90, 1, [(5, 5)]),
        (1, 2, 1, [(3, 3), (0, 4), (2, 2)]),
        (2, 4, 9, [(8, 8)]),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_odd_sizes(native_backend, batch, classes, per_cell, sizes, layout):
    inputs = heads(batch, classes, per_cell, sizes, layout=layout, device=native_backend.device)
    assert_same_candidates(*inputs, classes, 37)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_special_logits(native_backend, layout):
    """NaN of either sign comes first, -0.0 equals 0.0, and infinities and denormals have their places."""
    inputs = heads(layout=layout, device=native_backend.device)
    special = torch.tensor([NAN, -NAN, INF, -INF, 0.0, -0.0, 1e-40, -1e-40, 3e38])
    for x in inputs[0]:
        x.copy_(special[torch.randint(0, len(special), x.shape)].to(x.device))
    for count in (5, 40, 200):
        assert_same_candidates(*inputs, 3, count)
    for value in (NAN, 0.5, -INF):
        for x in inputs[0]:
            x.fill_(value)
        labels, indices = candidates(*inputs, 3, 10)[2:]
        assert labels.tolist() == [[0, 1, 2, 0, 1, 2, 0, 1, 2, 0]] * 2 and indices[0].tolist() == [
            0,
            0,
            0,
            1,
            1,
            1,
            2,
            2,
            2,
            3,
        ]


@pytest.mark.parametrize("box_coder", ["effdet", "torchvision"])
def test_boxes_are_decoded_and_clipped(native_backend, box_coder):
    cls_outputs, box_outputs, anchors = heads(device=native_backend.device)
    for x in box_outputs:
        x.view(-1)[::7] = (
            torch.tensor([NAN, 5.0, -5.0, 90.0, -200.0, INF, 0.0]).repeat(50)[: x.view(-1)[::7].numel()].to(x.device)
        )
    sizes = torch.tensor([[50.0, 80.0], [33.5, 120.0]], device=native_backend.device)
    for clip_sizes in (None, sizes):
        boxes = candidates(cls_outputs, box_outputs, anchors, 3, 60, clip_sizes, box_coder)[0]
        expected = decode_candidates_reference(cls_outputs, box_outputs, anchors, clip_sizes, 3, 60, box_coder)[0]
        torch.testing.assert_close(boxes, expected, rtol=1e-5, atol=1e-3, equal_nan=True)
        assert boxes.isnan().any()


def test_decodes_as_effdet_and_torchvision(backend):
    anchors_of = pytest.importorskip("effdet.anchors")
    cls_outputs, box_outputs, anchors = heads(1, 1, 1, [(6, 6)])
    arguments = [[x.to(backend.device) for x in outputs] for outputs in (cls_outputs, box_outputs)]
    deltas = box_outputs[0].permute(0, 2, 3, 1).reshape(-1, 4)
    effdet_boxes = anchors_of.decode_box_outputs(deltas, anchors[:, [1, 0, 3, 2]], output_xyxy=True)
    coder = torchvision.models.detection._utils.BoxCoder((1.0, 1.0, 1.0, 1.0))
    for name, expected in (("effdet", effdet_boxes), ("torchvision", coder.decode_single(deltas, anchors))):
        got = ops.decode_detections(
            *arguments, anchors.to(backend.device), num_classes=1, iou_threshold=1.0, max_detections=36, box_coder=name
        )
        assert got.counts.tolist() == [36]
        torch.testing.assert_close(got.boxes[0].cpu(), expected[got.indices[0].cpu()], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("method", ["hard", "linear"])
def test_candidates_of_each_level(backend, method, layout):
    """The limit is each level's: the detections are those of one call per level, through one suppression."""
    cls_outputs, box_outputs, anchors = heads(
        sizes=[(7, 5), (4, 3), (0, 3), (1, 2)], layout=layout, device=backend.device
    )
    options = {"num_classes": 3, "max_candidates": 20, "box_coder": "torchvision"}
    kept, start = [], 0
    for cls_output, box_output in zip(cls_outputs, box_outputs, strict=True):
        count = 2 * cls_output.shape[2] * cls_output.shape[3]
        if count:
            level = [[cls_output], [box_output], anchors[start : start + count]]
            found = ops.decode_detections(*level, **options, iou_threshold=1.0, max_detections=min(20, 3 * count))
            kept.append((found.boxes, found.scores, found.labels, found.indices + start))
        start += count
    boxes, scores, labels, indices = (torch.cat(parts, 1) for parts in zip(*kept, strict=True))
    rest = {"iou_threshold": 0.4, "score_threshold": 0.2, "max_detections": 30, "method": method}
    expected = ops.batched_nms_padded(boxes, scores, labels, **rest)
    actual = ops.decode_detections(cls_outputs, box_outputs, anchors, **options, **rest, candidates_per_level=True)
    assert torch.equal(actual.labels, expected.labels) and torch.equal(actual.counts, expected.counts)
    torch.testing.assert_close(actual.scores, expected.scores)
    torch.testing.assert_close(actual.boxes, expected.boxes)
    rows = indices.gather(1, expected.indices.clamp(min=0))
    assert torch.equal(actual.indices, torch.where(expected.indices >= 0, rows, -1))
    together = ops.decode_detections(cls_outputs, box_outputs, anchors, **options, **rest)
    assert not torch.equal(together.counts, actual.counts) or not torch.equal(together.labels, actual.labels)


@pytest.mark.parametrize("method", ["hard", "gaussian", "linear"])
@pytest.mark.parametrize("score_threshold", [None, 0.6])
def test_the_rest_is_batched_nms(backend, method, score_threshold):
    cls_outputs, box_outputs, anchors = heads(device=backend.device)
    options = {"max_detections": 25, "score_threshold": score_threshold, "method": method, "sigma": 0.4}
    got = ops.decode_detections(
        cls_outputs, box_outputs, anchors, num_classes=3, max_candidates=80, iou_threshold=0.35, **options
    )
    with ops.use_reference():
        boxes, scores, labels, indices = decode_candidates_reference(
            cls_outputs, box_outputs, anchors, None, 3, 80, "effdet"
        )
        expected = ops.batched_nms_padded(boxes, scores, labels, 0.35, **options)
    assert torch.equal(got.counts, expected.counts) and torch.equal(got.labels, expected.labels)
    torch.testing.assert_close(got.boxes, expected.boxes, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(got.scores, expected.scores, rtol=1e-5, atol=0)
    anchor_of = torch.where(expected.indices >= 0, indices.gather(1, expected.indices.clamp(min=0)), -1)
    assert torch.equal(got.indices, anchor_of) and got.counts.max() > 5


def test_nan_logits_are_first_or_dropped(backend):
    cls_outputs, box_outputs, anchors = heads(device=backend.device)
    cls_outputs[1][:, 0, 1, 1] = NAN
    first = ops.decode_detections(cls_outputs, box_outputs, anchors, num_classes=3)
    assert first.scores[:, 0].isnan().all() and not first.scores[:, 1:].isnan().any()
    for options in ({"score_threshold": 0.0}, {"method": "gaussian"}):
        assert (
            not ops.decode_detections(cls_outputs, box_outputs, anchors, num_classes=3, **options).scores.isnan().any()
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views(native_backend, dtype):
    """Sliced, misaligned and transposed outputs, whose surroundings are NaN."""
    cls_outputs, box_outputs, anchors = heads(dtype=dtype, device=native_backend.device)
    expected = ops.decode_detections(cls_outputs, box_outputs, anchors, num_classes=3, max_candidates=60)

    def misaligned(x):
        return torch.full((x.numel() + 5,), NAN, dtype=x.dtype, device=x.device)[1:-4].view(x.shape).copy_(x)

    def sliced(x):
        n, c, h, w = x.shape
        return torch.full((2 * n, c + 2, h, w + 1), NAN, dtype=x.dtype, device=x.device)[::2, 1:-1, :, :-1].copy_(x)

    def transposed(x):
        return x.transpose(2, 3).contiguous().transpose(2, 3)

    for view in (misaligned, sliced, transposed):
        got = ops.decode_detections(
            [view(x) for x in cls_outputs], [view(x) for x in box_outputs], anchors, num_classes=3, max_candidates=60
        )
        assert all_equal(got, expected)


def test_layouts_may_differ_between_tensors(native_backend):
    cls_outputs, box_outputs, anchors = heads(device=native_backend.device)
    expected = ops.decode_detections(cls_outputs, box_outputs, anchors, num_classes=3)
    box_outputs[1] = box_outputs[1].to(memory_format=torch.channels_last)
    cls_outputs[0] = cls_outputs[0].to(memory_format=torch.channels_last)
    assert all_equal(ops.decode_detections(cls_outputs, box_outputs, anchors, num_classes=3), expected)


@pytest.mark.parametrize("sizes", [[(0, 3)], [(3, 4)]])
def test_nothing_to_detect(backend, sizes):
    batch = 2 if sizes[0][0] == 0 else 0
    got = ops.decode_detections(*heads(batch, sizes=sizes, device=backend.device), num_classes=3, max_detections=4)
    assert got.boxes.shape == (batch, 4, 4) and (got.indices == -1).all() and got.counts.sum() == 0


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_many_logits(batch, ties, layout):
    """Lists that fill more than once, images cut into pieces, and logits that come in ascending order."""
    cls_outputs, box_outputs, anchors = large_heads(batch, layout, "cpu", ties)
    assert_same_candidates(cls_outputs, box_outputs, anchors, 30, 1000)
    ascending = [torch.arange(x.numel()).view(x.shape).to(x).to(memory_format=layout) for x in cls_outputs]
    assert_same_candidates(ascending, box_outputs, anchors, 30, 1000)


def test_several_blocks_of_a_gpu():
    backend = enter("emulated")
    next(backend)
    cls_outputs, box_outputs, anchors = heads(1, 40, 3, [(16, 12)])
    for layout in LAYOUTS.values():
        assert_same_candidates([x.to(memory_format=layout) for x in cls_outputs], box_outputs, anchors, 40, 700)
    assert next(backend, None) is None
