"""batched_nms_padded: image by image equal to torchvision's class loop, cut to the best K, in fixed shapes."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from effdet_fast import ops
from tests.checks import all_equal, assert_same_in_every_run, captured
from tests.conftest import enter
from tests.emulation.backend import emulated
from tests.ops.test_nms import DTYPES, NAN, grid_boxes, peer_batched_nms, random_boxes


def assert_like_peer(boxes, scores, labels, iou_threshold, *, max_detections=100, score_threshold=None):
    detections = ops.batched_nms_padded(
        boxes, scores, labels, iou_threshold, max_detections=max_detections, score_threshold=score_threshold
    )
    assert isinstance(detections, ops.Detections)
    batch, n = scores.shape
    shapes = ((batch, max_detections, 4), *[(batch, max_detections)] * 3, (batch,))
    for x, shape, dtype in zip(detections, shapes, (boxes.dtype, scores.dtype, *[torch.int64] * 3), strict=True):
        assert x.shape == shape and x.dtype == dtype and x.device == boxes.device and x.is_contiguous()
    got = ops.Detections(*(x.cpu() for x in detections))
    boxes, scores, labels = boxes.cpu(), scores.cpu(), labels.cpu()
    for image in range(batch):
        chosen = torch.arange(n)
        if score_threshold is not None:
            chosen = torch.where(scores[image].double() > score_threshold)[0]
        kept = peer_batched_nms(boxes[image][chosen], scores[image][chosen], labels[image][chosen], iou_threshold)
        kept = chosen[kept][:max_detections]
        count = len(kept)
        assert got.counts[image] == count
        assert torch.equal(got.indices[image, :count], kept)
        assert torch.equal(got.labels[image, :count], labels[image][kept].long())
        for ours, source in ((got.boxes, boxes), (got.scores, scores)):
            torch.testing.assert_close(ours[image, :count], source[image][kept], rtol=0, atol=0, equal_nan=True)
        assert (got.boxes[image, count:] == 0).all() and (got.scores[image, count:] == 0).all()
        assert (got.labels[image, count:] == -1).all() and (got.indices[image, count:] == -1).all()
    return got


def batch_of(backend, batch, n, classes=4, dtype=torch.float32, boxes=grid_boxes):
    scores = (torch.randint(0, 40, (batch, n)) / 40).to(backend.device, dtype)
    return (
        boxes(batch, n).to(backend.device, dtype),
        scores,
        torch.randint(0, classes, (batch, n), device=backend.device),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 150])
def test_equals_torchvision(backend, dtype, n):
    boxes, scores, labels = batch_of(backend, 3, n, dtype=dtype)
    for max_detections in (1, 7, 200):
        assert_like_peer(boxes, scores, labels, 0.4, max_detections=max_detections, score_threshold=0.2)
    assert_like_peer(boxes, scores, labels, 0.4)


@pytest.mark.parametrize("iou_threshold", [0.5, 0.7, 1 / 3, 0.0, -1.0, 1.0])
def test_ties_and_exact_thresholds(backend, iou_threshold):
    assert_like_peer(*batch_of(backend, 2, 130, classes=2), iou_threshold, max_detections=50)


def test_images_with_different_counts(backend):
    boxes, scores, labels = batch_of(backend, 4, 90)
    scores[0], scores[2, 40:], boxes[3] = 0.0, 0.0, boxes[3, :1]
    got = assert_like_peer(
        boxes, scores, labels * (torch.arange(4, device=labels.device) != 3)[:, None], 0.4, score_threshold=0.1
    )
    assert got.counts[0] == 0 and got.counts[3] == 1


def test_no_images(backend):
    got = ops.batched_nms_padded(*batch_of(backend, 0, 5), 0.5, max_detections=3)
    assert [list(x.shape) for x in got] == [[0, 3, 4], [0, 3], [0, 3], [0, 3], [0]]


def test_score_threshold_is_exact_and_strict(backend):
    boxes = random_boxes(1, 3, size=1.0).to(backend.device)
    labels = torch.arange(3, device=backend.device)[None]
    scores = torch.tensor([[0.5, 0.1, 0.25]], device=backend.device)
    above = float(torch.tensor(0.1).double())  # the float 0.1 is a little more than the number 0.1
    for threshold, count in [(0.5, 0), (0.25, 1), (0.1, 3), (above, 2), (-1.0, 3), (float("inf"), 0)]:
        got = assert_like_peer(boxes, scores, labels, 0.5, score_threshold=threshold)
        assert got.counts[0] == count


def test_nan_scores_come_first_or_not_at_all(backend):
    boxes, scores, labels = batch_of(backend, 2, 140)
    scores[0, ::2], scores[1, :70] = NAN, NAN  # more than a tile of them
    first = assert_like_peer(boxes, scores, labels, 0.5, max_detections=30)
    assert first.scores[0, 0].isnan()
    none = assert_like_peer(boxes, scores, labels, 0.5, max_detections=30, score_threshold=0.0)
    assert not none.scores.isnan().any() and none.counts[0] > 0


def test_classes_far_apart_and_on_the_cpu(backend):
    boxes, scores, _ = batch_of(backend, 2, 120)
    ids = torch.tensor([-(2**63), 2**63 - 1, 0, -1, 2**40, 2**40 + 1])
    labels = ids[torch.randint(0, 6, (2, 120))]
    assert_like_peer(boxes, scores, labels, 0.3)
    assert_like_peer(boxes, scores, (labels % 3).to(torch.int32), 0.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views(backend, dtype):
    """Sliced and misaligned inputs, whose surroundings are NaN."""
    source, scores, labels = batch_of(backend, 2, 70, dtype=dtype)

    def inside(shape, like, where):
        return torch.full(shape, NAN, device=backend.device, dtype=dtype)[where].view(like.shape).copy_(like)

    sliced = inside((2, 140, 6), source, (slice(None), slice(None, None, 2), slice(1, 5)))
    misaligned = inside((source.numel() + 3,), source, slice(1, -2))
    strided_scores = torch.full((70, 2, 3), NAN, device=backend.device, dtype=dtype)[..., 1].T.copy_(scores)
    for boxes in (sliced, misaligned):
        assert_like_peer(boxes, strided_scores, labels.T.contiguous().T, 0.3, max_detections=40)
    assert_like_peer(source[:1].expand(2, -1, -1), scores, labels[:, :1].expand(-1, 70), 0.3)


def test_more_kept_boxes_than_shared_memory_holds(native_backend):
    boxes, scores, labels = batch_of(native_backend, 2, 1100, classes=40, boxes=lambda *s: random_boxes(*s, size=5.0))
    got = assert_like_peer(boxes, scores, labels, 0.5, max_detections=1090)
    assert got.counts.min() > 1024


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_any_order_of_the_threads(seed):
    boxes, scores, labels = random_boxes(2, 200, extent=120.0), torch.rand(2, 200), torch.randint(0, 3, (2, 200))
    with emulated(thread_order_seed=seed):
        assert_like_peer(boxes, scores, labels, 0.3, max_detections=60, score_threshold=0.1)


def test_the_same_in_every_run_and_for_any_thread_count(native_backend):
    arguments = (*batch_of(native_backend, 3, 300), 0.4)
    assert_same_in_every_run(lambda: ops.batched_nms_padded(*arguments))


@given(
    data=st.data(),
    batch=st.integers(1, 2),
    n=st.integers(0, 80),
    max_detections=st.integers(1, 30),
    score_threshold=st.sampled_from([None, -1.0, 0.0, 0.2, 0.5]),
)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@pytest.mark.parametrize("name", ["reference", "cpu", "emulated"])
def test_random_grids(name, data, batch, n, max_detections, score_threshold):
    def drawn(low, high, count):
        return torch.tensor(data.draw(st.lists(st.integers(low, high), min_size=count, max_size=count)))

    boxes = drawn(-3, 4, 4 * batch * n).view(batch, n, 4).float()
    scores, labels = drawn(0, 5, batch * n).view(batch, n) / 5, drawn(-1, 2, batch * n).view(batch, n).long()
    threshold = data.draw(st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 0.7, 1.0]))
    backend = enter(name)
    next(backend)
    options = {"max_detections": max_detections, "score_threshold": score_threshold}
    assert_like_peer(boxes, scores.float(), labels, threshold, **options)
    assert next(backend, None) is None


def test_raw_op(device):
    boxes, scores, labels = grid_boxes(2, 60), torch.rand(2, 60).sort(1, True)[0], torch.randint(0, 3, (2, 60))
    order = torch.stack([torch.randperm(60), torch.arange(60)])
    boxes, scores, order, labels = (x.to(device) for x in (boxes, scores, order, labels))
    op = torch.ops.effdet_fast.nms_padded.default
    for threshold in (None, 0.3):
        torch.library.opcheck(op, (boxes, scores, order, labels, 0.5, threshold, 20))
    torch.library.opcheck(op, (boxes[:, :0], scores[:, :0], order[:, :0], labels[:, :0], 0.5, None, 20))
    with pytest.raises(RuntimeError, match="scores must be contiguous"):
        op(boxes, scores.double(), order, labels, 0.5, None, 20)
    with pytest.raises(RuntimeError, match="max_detections"):
        op(boxes, scores, order, labels, 0.5, None, 0)


@pytest.mark.compiles
def test_compiled(device):
    """One graph; the shapes of the result depend on no value."""
    detect = torch.compile(ops.batched_nms_padded, fullgraph=True)
    for _ in range(2):
        boxes, scores, labels = (
            x.to(device) for x in (grid_boxes(2, 50), torch.rand(2, 50), torch.randint(0, 3, (2, 50)))
        )
        options = {"max_detections": 30, "score_threshold": 0.1}
        got = detect(boxes, scores, labels, 0.4, **options)
        assert all_equal(got, ops.batched_nms_padded(boxes, scores, labels, 0.4, **options))


def test_fake_tensors():
    with torch._subclasses.FakeTensorMode():
        got = ops.batched_nms_padded(
            torch.empty(2, 9, 4), torch.empty(2, 9), torch.empty(2, 9).long(), 0.5, max_detections=3
        )
    assert [list(x.shape) for x in got] == [[2, 3, 4], [2, 3], [2, 3], [2, 3], [2]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_takes_mixed_dtypes(native_backend, dtype):
    boxes, scores, labels = batch_of(native_backend, 2, 50)
    with torch.autocast(native_backend.device.type, dtype):
        got = ops.batched_nms_padded(boxes, scores.to(dtype), labels, 0.4)
    assert got.scores.dtype == torch.float32
    assert all_equal(got, ops.batched_nms_padded(boxes, scores.to(dtype).float(), labels, 0.4))


def test_inputs_that_require_a_gradient(backend):
    boxes, scores, labels = batch_of(backend, 2, 20)
    got = ops.batched_nms_padded(boxes.requires_grad_(), scores.requires_grad_(), labels, 0.5)
    assert not got.boxes.requires_grad and not got.scores.requires_grad


BOXES, SCORES, LABELS = torch.zeros(2, 8, 4), torch.zeros(2, 8), torch.zeros(2, 8, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"boxes": BOXES[0]}, ValueError, "boxes must have shape [B, N, 4], got [8, 4]"),
        ({"scores": SCORES[:, :7]}, ValueError, "scores must have shape [2, 8], got [2, 7]"),
        ({"labels": LABELS[0]}, ValueError, "labels must have shape [2, 8], got [8]"),
        ({"labels": SCORES}, TypeError, "labels must be an integer tensor, got float32"),
        ({"scores": SCORES.half()}, TypeError, "scores must have the dtype of boxes, float32, got float16"),
        ({"iou_threshold": NAN}, ValueError, "iou_threshold must be a number, got nan"),
        ({"score_threshold": NAN}, ValueError, "score_threshold must be a number, got nan"),
        ({"score_threshold": "low"}, TypeError, "score_threshold must be a number, got str"),
        ({"max_detections": 0}, ValueError, "max_detections must be in [1, 1073741824], got 0"),
        ({"max_detections": 2.5}, TypeError, "max_detections must be an int, got float"),
        ({"method": "soft"}, ValueError, "method must be one of 'hard', 'gaussian', 'linear', got 'soft'"),
    ],
)
def test_errors(changed, error, message):
    arguments = {"boxes": BOXES, "scores": SCORES, "labels": LABELS, "iou_threshold": 0.5}
    with pytest.raises(error) as raised:
        ops.batched_nms_padded(**{**arguments, **changed})
    assert str(raised.value) == f"batched_nms_padded: {message}"


@pytest.mark.cuda
def test_never_waits_and_can_be_captured():
    boxes, scores, labels = (
        x.cuda() for x in (random_boxes(4, 900), torch.rand(4, 900), torch.randint(0, 5, (4, 900)))
    )
    graph, found = captured(lambda: ops.batched_nms_padded(boxes, scores, labels, 0.5))
    scores.copy_(torch.rand(4, 900))
    graph.replay()
    assert all_equal(found, ops.batched_nms_padded(boxes, scores, labels, 0.5))
