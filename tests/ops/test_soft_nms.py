"""soft_nms, and batched_nms_padded with a soft method: every pick is the best that was left, by a float64 replay."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from effdet_fast import ops
from effdet_fast._choices import NMS_METHODS
from tests.checks import DTYPES, all_equal, assert_same_in_every_run, captured
from tests.conftest import enter
from tests.emulation.backend import emulated
from tests.ops.test_nms import INF, NAN, grid_boxes, random_boxes

METHODS = ["gaussian", "linear"]
LARGE = 1e9  # no box in these tests has such a score


def decays_of(boxes, i, method, sigma, iou_threshold):
    """What box i makes of every score, in float64 on the CPU."""
    overlap = (torch.minimum(boxes[i, 2:], boxes[:, 2:]) - torch.maximum(boxes[i, :2], boxes[:, :2])).clamp(min=0)
    intersection, areas = overlap.prod(1), (boxes[:, 2:] - boxes[:, :2]).prod(1)
    iou = (intersection / (areas[i] + areas - intersection)).nan_to_num(0)
    return torch.exp(-iou.square() / sigma) if method == "gaussian" else torch.where(iou > iou_threshold, 1 - iou, 1)


def replay(
    boxes, scores, idxs, kept, decayed, *, method, sigma=0.5, iou_threshold=0.3, score_threshold=0.001, stop=None
):
    """Follows the picks in float64: each has the score it says, none left was better, and no one left out was good enough."""
    boxes, current = boxes.cpu().double(), scores.cpu().double().clone()
    idxs = torch.zeros(len(scores)) if idxs is None else idxs.cpu()
    tolerance = 4 * torch.finfo(scores.dtype).eps
    current[~(current > score_threshold)] = -LARGE
    for i, score in zip(kept.tolist(), decayed.cpu().double().tolist(), strict=True):
        assert abs(score - current[i]) <= tolerance * abs(current[i]), (i, score, current[i])
        assert score > score_threshold * (1 - tolerance)
        assert current.max() <= current[i] * (1 + tolerance)
        decays = decays_of(boxes, i, method, sigma, iou_threshold)
        current = torch.where((idxs == idxs[i]) & (current > -LARGE), current * decays, current)
        current[i] = -LARGE
    if stop is None or len(kept) < stop:
        assert (current <= score_threshold * (1 + tolerance)).all()


def check(boxes, scores, idxs=None, **options):
    """Replays what the public function and the padded one say; both are told to stop at 40 once."""
    kept, decayed = ops.soft_nms(boxes, scores, idxs, **options)
    assert kept.dtype == torch.int64 and decayed.dtype == scores.dtype and kept.device == decayed.device == boxes.device
    assert kept.unique().numel() == kept.numel() == decayed.numel()
    replay(boxes, scores, idxs, kept.cpu(), decayed, **options)
    first, _ = ops.soft_nms(boxes, scores, idxs, **options, max_detections=40)
    assert torch.equal(first, kept[:40])
    return kept.cpu(), decayed.cpu()


def distinct_scores(n):
    return (torch.randperm(n) + 1.0) / (n + 1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [0, 1, 2, 15, 16, 17, 90])
def test_every_pick_is_the_best_left(backend, method, n):
    boxes, scores = random_boxes(n, extent=200.0).to(backend.device), distinct_scores(n).to(backend.device)
    check(boxes, scores, method=method)
    check(boxes, scores, torch.randint(0, 5, (n,)).to(backend.device), method=method, score_threshold=0.2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(backend, method, dtype):
    n = 70
    boxes, scores = grid_boxes(n).to(backend.device, dtype), (torch.randint(1, 64, (n,)) / 64).to(backend.device, dtype)
    kept, decayed = check(boxes, scores, torch.arange(n) % 3, method=method, score_threshold=0.01)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    with_wide, wide_scores = ops.soft_nms(
        boxes.to(wide), scores.to(wide), torch.arange(n) % 3, method=method, score_threshold=0.01
    )
    assert torch.equal(with_wide.cpu(), kept) and torch.equal(wide_scores.cpu().to(dtype), decayed)


@pytest.mark.parametrize("iou_threshold", [0.3, 0.5, 1 / 3, 0.0, -1.0, 1.0])
def test_linear_equals_the_formula_to_the_bit(native_backend, iou_threshold):
    """Ties and IoUs exactly at the threshold included; the reference computes the same float32 operations."""
    boxes, scores = (
        grid_boxes(100).to(native_backend.device),
        (torch.randint(1, 9, (100,)) / 8).to(native_backend.device),
    )
    idxs = torch.randint(0, 2, (100,)).to(native_backend.device)
    options = {"method": "linear", "iou_threshold": iou_threshold, "score_threshold": 0.01}
    expected = ops.soft_nms_reference(boxes, scores, idxs, **options)
    assert (expected[1] < scores[expected[0]]).any() == (iou_threshold < 1) and len(expected[0]) > 50
    assert all_equal(ops.soft_nms(boxes, scores, idxs, **options), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sigma", [0.1, 0.5, 2.0])
def test_equals_effdet(backend, method, sigma):
    peer = pytest.importorskip("effdet.soft_nms")
    boxes, scores, idxs = random_boxes(80, extent=150.0).abs(), distinct_scores(80), torch.randint(0, 3, (80,))
    boxes[:, 2:] = boxes[:, :2] + boxes[:, 2:] % 50 + 5
    expected, expected_scores = peer.batched_soft_nms(
        boxes.double(), scores.double(), idxs, method == "gaussian", sigma, 0.3, 0.05
    )
    kept, decayed = ops.soft_nms(
        boxes.to(backend.device),
        scores.to(backend.device),
        idxs,
        method=method,
        sigma=sigma,
        iou_threshold=0.3,
        score_threshold=0.05,
    )
    assert torch.equal(kept.cpu(), expected) and len(kept) < 80
    torch.testing.assert_close(decayed.cpu(), expected_scores.float(), rtol=1e-5, atol=0)


def test_by_hand(backend):
    boxes = torch.tensor([[0.0, 0, 4, 1], [0, 0, 2, 1], [9, 9, 10, 10], [0, 0, 4, 1]], device=backend.device)
    scores = torch.tensor([1.0, 0.75, 0.5, 0.25], device=backend.device)
    kept, decayed = ops.soft_nms(
        boxes, scores, method="linear", score_threshold=0.0
    )  # IoU of the last with the first is 1
    assert kept.tolist() == [0, 2, 1] and decayed.tolist() == [1.0, 0.5, 0.375]
    kept, decayed = ops.soft_nms(boxes, scores, sigma=0.5)
    assert kept.tolist() == [0, 2, 1, 3]
    expected = [1.0, 0.5, 0.75 * 2.718281828**-0.5, 0.25 * 2.718281828**-2.5]
    torch.testing.assert_close(decayed.cpu(), torch.tensor(expected), rtol=1e-6, atol=0)
    kept, _ = ops.soft_nms(boxes, scores, torch.tensor([0, 1, 0, 1], dtype=torch.uint8), score_threshold=0.1)
    assert kept.tolist() == [0, 1, 2, 3]


def test_equal_scores_take_the_lowest_index_first(backend):
    boxes = torch.tensor([[0.0, 0, 1, 1]], device=backend.device).repeat(70, 1)
    boxes += torch.arange(70, device=backend.device)[:, None] * 2
    ones = torch.ones(70, device=backend.device)
    for idxs in (None, torch.arange(70) % 7, 70 - torch.arange(70)):
        assert ops.soft_nms(boxes, ones, idxs)[0].tolist() == list(range(70))


def test_nan_scores_never_take_part(backend):
    boxes = grid_boxes(60).to(backend.device)
    scores = torch.tensor([NAN, 0.9, INF, -INF, 0.5, -1.0]).repeat(10).to(backend.device)
    for threshold in (0.001, -INF):
        kept, decayed = ops.soft_nms(boxes, scores, torch.arange(60), score_threshold=threshold)
        assert not decayed.isnan().any() and set((kept % 6).tolist()) == ({1, 2, 4} if threshold > 0 else {1, 2, 4, 5})
        assert kept[0] == 2
    padded = ops.batched_nms_padded(boxes[None], scores[None], torch.arange(60)[None], 0.3, method="gaussian")
    assert padded.counts.tolist() == [40] and not padded.scores.isnan().any()


def test_boxes_without_an_iou_do_not_decay(backend):
    boxes = torch.tensor(
        [[NAN, 0, 4, 4], [0, 0, 4, 4], [1, 1, 1, 1], [1, 1, 1, 1], [0, 0, NAN, NAN]], device=backend.device
    )
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5], device=backend.device)
    for method in METHODS:
        kept, decayed = ops.soft_nms(boxes, scores, method=method)
        assert kept.tolist() == [0, 1, 2, 3, 4] and torch.equal(decayed, scores)


def test_the_score_threshold_is_strict(backend):
    boxes, scores = random_boxes(3, size=1.0).to(backend.device), torch.tensor([0.5, 0.1, 0.25], device=backend.device)
    above = float(torch.tensor(0.1).double())  # the float 0.1 is a little more than the number 0.1
    for threshold, count in [(0.5, 0), (0.25, 1), (0.1, 3), (above, 2), (-1.0, 3), (INF, 0)]:
        assert len(ops.soft_nms(boxes, scores, torch.arange(3), score_threshold=threshold)[0]) == count


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_its_images(backend, method):
    boxes, scores = random_boxes(3, 60, extent=150.0).to(backend.device), torch.rand(3, 60).to(backend.device)
    scores[1], labels = 0.0, torch.randint(0, 3, (3, 60))
    for max_detections in (1, 25, 80):
        options = {"method": method, "sigma": 0.3, "score_threshold": 0.1, "max_detections": max_detections}
        got = ops.batched_nms_padded(boxes, scores, labels, 0.2, **options)
        for image in range(3):
            kept, decayed = ops.soft_nms(boxes[image], scores[image], labels[image], iou_threshold=0.2, **options)
            count = len(kept)
            assert got.counts[image] == count <= max_detections and torch.equal(got.indices[image, :count], kept)
            assert torch.equal(got.scores[image, :count], decayed) and torch.equal(
                got.boxes[image, :count], boxes[image][kept]
            )
            assert torch.equal(got.labels[image, :count].cpu(), labels[image][kept.cpu()])
            assert (got.boxes[image, count:] == 0).all() and (got.scores[image, count:] == 0).all()
            assert (got.labels[image, count:] == -1).all() and (got.indices[image, count:] == -1).all()
        assert got.counts[1] == 0


def test_without_a_score_threshold_all_are_kept(backend):
    boxes, scores = grid_boxes(1, 50).to(backend.device), torch.rand(1, 50).to(backend.device)
    got = ops.batched_nms_padded(boxes, scores, torch.zeros(1, 50).long(), 0.3, method="linear", max_detections=60)
    assert got.counts.tolist() == [50]


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_nothing_to_detect(backend, shape):
    boxes, scores = torch.zeros(*shape, 4, device=backend.device), torch.zeros(shape, device=backend.device)
    got = ops.batched_nms_padded(boxes, scores, torch.zeros(shape).long(), 0.5, method="gaussian", max_detections=3)
    assert got.boxes.shape == (shape[0], 3, 4) and (got.indices == -1).all() and (got.counts == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views(backend, dtype):
    """Sliced, transposed and misaligned inputs, whose surroundings are NaN."""
    n = 50
    source, scores = grid_boxes(n).to(backend.device, dtype), distinct_scores(n).to(backend.device, dtype)
    expected = ops.soft_nms(source, scores)
    sliced = torch.full((2 * n, 7), NAN, device=backend.device, dtype=dtype)[::2, 2:6].copy_(source)
    transposed = torch.full((4, n + 3), NAN, device=backend.device, dtype=dtype)[:, 1:-2].copy_(source.T).T
    misaligned = torch.full((4 * n + 5,), NAN, device=backend.device, dtype=dtype)[1:-4].view(n, 4).copy_(source)
    strided_scores = torch.full((n, 3), NAN, device=backend.device, dtype=dtype)[:, 1].copy_(scores)
    for boxes in (sliced, transposed, misaligned):
        assert all_equal(ops.soft_nms(boxes, strided_scores), expected)


def test_more_boxes_than_shared_memory_holds(native_backend):
    n = 12500
    boxes, scores = (
        random_boxes(n, extent=4000.0).to(native_backend.device),
        distinct_scores(n).to(native_backend.device),
    )
    kept, decayed = ops.soft_nms(boxes, scores, max_detections=6)
    replay(boxes, scores, None, kept.cpu(), decayed, method="gaussian", stop=6)
    assert len(kept) == 6


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_any_order_of_the_threads(seed):
    boxes, scores, idxs = random_boxes(150, extent=120.0), distinct_scores(150), torch.randint(0, 3, (150,))
    with emulated(thread_order_seed=seed):
        check(boxes, scores, idxs, method="gaussian", score_threshold=0.2)


def test_the_same_in_every_run_and_for_any_thread_count(native_backend):
    boxes, scores = (
        random_boxes(3, 100, extent=150.0).to(native_backend.device),
        torch.rand(3, 100).to(native_backend.device),
    )
    arguments = (boxes, scores, torch.randint(0, 3, (3, 100)), 0.4)
    options = {"method": "gaussian", "max_detections": 30}
    assert_same_in_every_run(lambda: ops.batched_nms_padded(*arguments, **options))


@given(
    data=st.data(),
    n=st.integers(0, 60),
    classes=st.integers(1, 3),
    iou_threshold=st.sampled_from([0.0, 0.25, 1 / 3, 0.5]),
)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@pytest.mark.parametrize("name", ["cpu", "emulated"])
def test_random_grids_equal_the_formula(name, data, n, classes, iou_threshold):
    def drawn(low, high, count):
        return torch.tensor(
            data.draw(st.lists(st.integers(low, high), min_size=count, max_size=count)), dtype=torch.int64
        )

    boxes, scores, idxs = drawn(-3, 4, 4 * n).view(n, 4).float(), drawn(0, 5, n) / 5, drawn(0, classes - 1, n)
    options = {
        "method": "linear",
        "iou_threshold": iou_threshold,
        "score_threshold": data.draw(st.sampled_from([-1.0, 0.0, 0.2])),
    }
    expected = ops.soft_nms_reference(boxes, scores, idxs, **options)
    backend = enter(name)
    next(backend)
    got = ops.soft_nms(boxes, scores, idxs, **options)
    assert next(backend, None) is None
    assert all_equal(got, expected)


def test_raw_op(device):
    boxes, scores, labels = (x.to(device) for x in (grid_boxes(2, 40), torch.rand(2, 40), torch.randint(0, 3, (2, 40))))
    op = torch.ops.effdet_fast.soft_nms.default
    for method in NMS_METHODS["gaussian"], NMS_METHODS["linear"]:
        torch.library.opcheck(op, (boxes, scores, labels, method, 0.5, 0.3, 0.1, 20))
    torch.library.opcheck(op, (boxes[:, :0], scores[:, :0], labels[:, :0], method, 0.5, 0.3, 0.1, 20))
    for changed, message in [
        ((boxes[0], scores, labels), "boxes must be contiguous"),
        ((boxes, scores.double(), labels), "scores must be contiguous"),
        ((boxes, scores, labels.int()), "labels must be contiguous int64"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            op(*changed, method, 0.5, 0.3, 0.1, 20)
    with pytest.raises(RuntimeError, match="max_detections"):
        op(boxes, scores, labels, method, 0.5, 0.3, 0.1, 0)
    with pytest.raises(RuntimeError, match="method must be a number from 1 to 2, got 0"):
        op(boxes, scores, labels, NMS_METHODS["hard"], 0.5, 0.3, 0.1, 20)


@pytest.mark.compiles
def test_compiled(device):
    """One graph; the padded form's shapes depend on no value."""
    boxes, scores, labels = (x.to(device) for x in (grid_boxes(2, 50), torch.rand(2, 50), torch.randint(0, 3, (2, 50))))
    padded = torch.compile(ops.batched_nms_padded, fullgraph=True)
    options = {"method": "gaussian", "max_detections": 30, "score_threshold": 0.1}
    assert all_equal(
        padded(boxes, scores, labels, 0.4, **options), ops.batched_nms_padded(boxes, scores, labels, 0.4, **options)
    )
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        single = torch.compile(ops.soft_nms, fullgraph=True, backend="aot_eager")
        assert all_equal(single(boxes[0], scores[0]), ops.soft_nms(boxes[0], scores[0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_takes_mixed_dtypes(native_backend, dtype):
    boxes, scores = grid_boxes(50).to(native_backend.device), torch.rand(50).to(native_backend.device, dtype)
    with torch.autocast(native_backend.device.type, dtype):
        got = ops.soft_nms(boxes, scores)
    assert got[1].dtype == torch.float32 and all_equal(got, ops.soft_nms(boxes, scores.float()))


def test_inputs_that_require_a_gradient(backend):
    boxes, scores = (
        grid_boxes(20).to(backend.device).requires_grad_(),
        torch.rand(20, device=backend.device, requires_grad=True),
    )
    assert not ops.soft_nms(boxes, scores)[1].requires_grad


BOXES, SCORES = torch.zeros(8, 4), torch.zeros(8)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"boxes": BOXES[:, :3]}, ValueError, "boxes must have shape [N, 4], got [8, 3]"),
        ({"scores": SCORES[:7]}, ValueError, "scores must have shape [8], got [7]"),
        ({"scores": SCORES.double()}, TypeError, "scores must have the dtype of boxes, float32, got float64"),
        ({"idxs": SCORES}, TypeError, "idxs must be an integer tensor, got float32"),
        ({"idxs": torch.zeros(7).long()}, ValueError, "idxs must have shape [8], got [7]"),
        ({"method": "hard"}, ValueError, "method must be one of 'gaussian', 'linear', got 'hard'"),
        ({"sigma": 0}, ValueError, "sigma must be above 0, got 0.0"),
        ({"sigma": "wide"}, TypeError, "sigma must be a number, got str"),
        ({"iou_threshold": NAN}, ValueError, "iou_threshold must be a number, got nan"),
        ({"score_threshold": NAN}, ValueError, "score_threshold must be a number, got nan"),
        ({"score_threshold": None}, TypeError, "score_threshold must be a number, got NoneType"),
        ({"max_detections": 0}, ValueError, "max_detections must be in [1, 1073741824], got 0"),
        ({"max_detections": 2.0}, TypeError, "max_detections must be an int, got float"),
    ],
)
def test_errors(changed, error, message):
    with pytest.raises(error) as raised:
        ops.soft_nms(**{"boxes": BOXES, "scores": SCORES, **changed})
    assert str(raised.value) == f"soft_nms: {message}"


def test_errors_of_the_padded_form():
    with pytest.raises(ValueError, match="batched_nms_padded: sigma must be above 0, got -1"):
        ops.batched_nms_padded(BOXES[None], SCORES[None], SCORES[None].long(), 0.5, method="gaussian", sigma=-1)


@pytest.mark.cuda
def test_the_padded_form_never_waits_and_can_be_captured():
    boxes, scores, labels = (
        x.cuda() for x in (random_boxes(4, 900), torch.rand(4, 900), torch.randint(0, 5, (4, 900)))
    )
    graph, found = captured(lambda: ops.batched_nms_padded(boxes, scores, labels, 0.5, method="gaussian"))
    scores.copy_(torch.rand(4, 900))
    graph.replay()
    assert all_equal(found, ops.batched_nms_padded(boxes, scores, labels, 0.5, method="gaussian"))
