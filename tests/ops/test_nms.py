"""nms and batched_nms: equal to torchvision's CPU results, for every input and on every backend."""

import itertools

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from effdet_fast import ops
from effdet_fast.ops import _library
from tests.checks import DTYPES, assert_same_in_every_run
from tests.conftest import enter
from tests.emulation.backend import emulated

NAN, INF = float("nan"), float("inf")


def computed(x):
    """A tensor in the dtype ours computes in: torchvision's CPU kernel takes no other."""
    return x.cpu() if x.dtype == torch.float64 else x.cpu().float()


def peer_nms(boxes, scores, iou_threshold):
    return torchvision.ops.nms(computed(boxes), computed(scores), iou_threshold)


def peer_batched_nms(boxes, scores, idxs, iou_threshold):
    """torchvision class by class, joined in a stable order."""
    boxes, scores, idxs = computed(boxes), computed(scores), idxs.cpu()
    keep = torch.zeros(len(scores), dtype=torch.bool)
    for c in idxs.unique():
        members = torch.where(idxs == c)[0]
        keep[members[torchvision.ops.nms(boxes[members], scores[members], iou_threshold)]] = True
    kept = torch.where(keep)[0]
    return kept[scores[kept].argsort(descending=True, stable=True)]


def assert_like_peer(boxes, scores, idxs, iou_threshold):
    """Both functions, on a backend's tensors."""
    assert torch.equal(ops.nms(boxes, scores, iou_threshold).cpu(), peer_nms(boxes, scores, iou_threshold))
    kept = ops.batched_nms(boxes, scores, idxs, iou_threshold)
    assert kept.dtype == torch.int64 and kept.device == boxes.device
    assert torch.equal(kept.cpu(), peer_batched_nms(boxes, scores, idxs, iou_threshold))


def random_boxes(*shape, size=60.0, extent=400.0):
    corner = torch.rand(*shape, 2) * extent - extent / 2
    return torch.cat([corner, corner + torch.rand(*shape, 2) * size + 1], -1)


def grid_boxes(*shape):
    """Coarse coordinates, so that IoU hits simple fractions, boxes repeat, and some have no or negative size."""
    corner = torch.randint(-6, 7, (*shape, 2))
    return torch.cat([corner, corner + torch.randint(-1, 6, (*shape, 2))], -1).float()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [0, 1, 2, 63, 64, 65, 200])
def test_equals_torchvision(backend, dtype, n):
    boxes, scores = random_boxes(n).to(backend.device, dtype), torch.rand(n).to(backend.device, dtype)
    assert_like_peer(boxes, scores, torch.randint(0, 5, (n,), device=backend.device), 0.4)


@pytest.mark.parametrize("iou_threshold", [0.5, 0.7, 1 / 3, 0.1, 0.0, -0.5, 1.0, 2.0, -INF, INF, 1e300, 1])
def test_ties_and_exact_thresholds(backend, iou_threshold):
    boxes, scores = grid_boxes(130).to(backend.device), (torch.randint(0, 8, (130,)) / 8).to(backend.device)
    assert_like_peer(boxes, scores, torch.randint(-2, 2, (130,), device=backend.device), iou_threshold)


def test_iou_of_exactly_the_threshold_is_kept(backend):
    """2/4, 7/10: the first is a float, the second rounds up to one above the float64 threshold 0.7."""
    half = torch.tensor([[0.0, 0, 4, 1], [0, 0, 2, 1]], device=backend.device)
    tenths = torch.tensor([[0.0, 0, 10, 1], [0, 0, 7, 1]], device=backend.device)
    scores = torch.tensor([1.0, 0.5], device=backend.device)
    for boxes, threshold in [(half, 0.5), (tenths, 0.7), (tenths.double(), 0.7)]:
        kept = ops.nms(boxes, scores.to(boxes.dtype), threshold)
        assert torch.equal(kept.cpu(), peer_nms(boxes, scores.to(boxes.dtype), threshold))
    assert len(ops.nms(half, scores, 0.5)) == 2
    assert len(ops.nms(half, scores, 0.4999999999)) == 1
    assert len(ops.nms(tenths, scores, 0.7)) == (1 if float(np.float32(0.7)) > 0.7 else 2)


def rounded_iou(a, b):
    """The IoU with every operation rounded on its own."""
    area_a, area_b = (a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])
    zero = a.dtype.type(0)
    width = max(zero, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(zero, min(a[3], b[3]) - max(a[1], b[1]))
    inter = width * height
    return inter / (area_a + area_b - inter)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_bit_of_the_iou(backend, dtype):
    """A pair is kept with its own IoU as the threshold, and not with the next number below: a fused product would show."""
    random = np.random.default_rng(0)
    scores = torch.tensor([1.0, 0.5], dtype=torch.float32 if dtype == np.float32 else torch.float64)
    for _ in range(150):
        corner = random.random((2, 2)) * 10
        pair = np.concatenate([corner, corner + 10 + random.random((2, 2)) * 10], 1).astype(dtype)
        value = rounded_iou(*pair)
        boxes = torch.from_numpy(pair).to(backend.device)
        assert len(ops.nms(boxes, scores.to(backend.device), float(value))) == 2
        below = np.nextafter(float(value), 0)
        assert len(ops.nms(boxes, scores.to(backend.device), below)) == 1


def test_every_bit_of_the_iou_across_tiles(native_backend):
    """As above, with so many boxes between the two that another part of the kernel compares them."""
    between = 5000 if native_backend.name != "emulated" else 100
    random = np.random.default_rng(3)
    corner = 100 + 2 * torch.arange(between).float()[:, None].expand(-1, 2)
    scores = torch.linspace(1, 0, between + 2, device=native_backend.device)
    for _ in range(5):
        start = random.random((2, 2)) * 10
        pair = np.concatenate([start, start + 10 + random.random((2, 2)) * 10], 1).astype(np.float32)
        value = float(rounded_iou(*pair))
        first, last = torch.from_numpy(pair).split(1)
        boxes = torch.cat([first, torch.cat([corner, corner + 1], 1), last]).to(native_backend.device)
        assert len(ops.nms(boxes, scores, value)) == between + 2
        assert len(ops.nms(boxes, scores, np.nextafter(value, 0))) == between + 1


SPECIAL_VALUES = [NAN, INF, -INF, 0.0, -0.0, 5.0, -7.0, 3e38, -3e38, 1e-40]


@pytest.mark.parametrize("iou_threshold", [0.5, 0.0, -1.0])
def test_special_coordinates(backend, iou_threshold):
    """NaN, infinite, zero-area, reversed, overflowing and denormal boxes, each among ordinary ones."""
    random = np.random.default_rng(1)
    odd = torch.tensor(random.choice(SPECIAL_VALUES, (150, 4)), dtype=torch.float32)
    boxes = torch.cat([odd, grid_boxes(50), odd[:50]])[torch.randperm(250)]
    scores = torch.rand(250)
    assert_like_peer(
        boxes.to(backend.device),
        scores.to(backend.device),
        torch.randint(0, 3, (250,)).to(backend.device),
        iou_threshold,
    )
    pairs = torch.tensor(list(itertools.product([NAN, INF, 0.0, 2.0], repeat=4)))
    assert_like_peer(
        pairs.to(backend.device),
        torch.rand(256).to(backend.device),
        torch.zeros(256, dtype=torch.int64, device=backend.device),
        iou_threshold,
    )


def test_scores_with_nan_come_first(backend):
    boxes = grid_boxes(90).to(backend.device)
    scores = torch.tensor(np.random.default_rng(2).choice([NAN, INF, -INF, 0.5, 0.0, -0.0], 90), dtype=torch.float32)
    assert_like_peer(boxes, scores.to(backend.device), torch.randint(0, 3, (90,), device=backend.device), 0.3)
    far = torch.tensor([[0.0, 0, 1, 1], [5, 5, 6, 6], [9, 9, 10, 10]], device=backend.device)
    assert ops.nms(far, torch.tensor([1.0, INF, NAN], device=backend.device), 0.5).tolist() == [2, 1, 0]


def test_all_scores_equal_keeps_the_lowest_index(backend):
    boxes = torch.tensor([[0.0, 0, 4, 4]], device=backend.device).repeat(70, 1)
    assert ops.nms(boxes, torch.ones(70, device=backend.device), 0.5).tolist() == [0]
    kept = ops.batched_nms(boxes, torch.ones(70, device=backend.device), torch.arange(70) % 7, 0.5)
    assert kept.tolist() == list(range(7))


def test_class_ids_of_any_size(backend):
    ids = torch.tensor([-(2**63), 2**63 - 1, 0, -1, 2**40, 2**40 + 1])
    idxs = ids[torch.randint(0, 6, (150,))]
    boxes, scores = grid_boxes(150).to(backend.device), torch.rand(150).to(backend.device)
    assert_like_peer(boxes, scores, idxs.to(backend.device), 0.3)


def test_negative_coordinates_do_not_mix_classes(backend):
    """torchvision's coordinate offsets let these two classes overlap."""
    boxes = torch.tensor([[-2.0, -2, 0, 0], [-3, -3, -1, -1], [-2, -2, 0, 0]], device=backend.device)
    scores = torch.tensor([0.9, 0.8, 0.7], device=backend.device)
    assert ops.batched_nms(boxes, scores, torch.tensor([0, 1, 1], device=backend.device), 0.1).tolist() == [0, 1]


def test_float16_finds_duplicates_of_a_high_class(backend):
    boxes = torch.tensor([[500.0, 500, 508, 508], [500, 500, 508, 509]], device=backend.device).half()
    scores = torch.tensor([0.5, 0.9], device=backend.device).half()
    assert ops.batched_nms(boxes, scores, torch.tensor([89, 89]), 0.5).tolist() == [1]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_integer_dtypes_of_classes(backend, dtype):
    boxes, scores, idxs = (
        grid_boxes(60).to(backend.device),
        torch.rand(60).to(backend.device),
        torch.randint(0, 4, (60,)),
    )
    expected = peer_batched_nms(boxes, scores, idxs, 0.3)
    assert torch.equal(ops.batched_nms(boxes, scores, idxs.to(backend.device, dtype), 0.3).cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views(backend, dtype):
    """Sliced, transposed, misaligned and expanded inputs, whose surroundings are NaN."""
    n = 100
    source, scores, idxs = (
        grid_boxes(n).to(backend.device, dtype),
        torch.rand(n).to(backend.device, dtype),
        torch.arange(n) % 3,
    )
    expected = peer_batched_nms(source, scores, idxs, 0.3)
    sliced = torch.full((2 * n, 7), NAN, device=backend.device, dtype=dtype)[::2, 2:6].copy_(source)
    transposed = torch.full((4, n + 3), NAN, device=backend.device, dtype=dtype)[:, 1:-2].copy_(source.T).T
    misaligned = torch.full((4 * n + 5,), NAN, device=backend.device, dtype=dtype)[1:-4].view(n, 4).copy_(source)
    strided_scores = torch.full((n, 3), NAN, device=backend.device, dtype=dtype)[:, 1].copy_(scores)
    for boxes in (sliced, transposed, misaligned):
        assert torch.equal(ops.batched_nms(boxes, strided_scores, idxs, 0.3).cpu(), expected)
    same = source[:1].expand(n, 4)
    assert len(ops.nms(same, scores, 0.3)) == (1 if peer_nms(same, scores, 0.3).numel() == 1 else n)


def test_many_boxes_of_one_class(native_backend):
    """More than a tile of the large-class path on the CPU, many tiles on a GPU."""
    n = 6000 if native_backend.name == "cpu" else 700
    boxes = random_boxes(n, extent=1000.0 if n == 6000 else 300.0).to(native_backend.device)
    scores, idxs = (
        torch.rand(n).to(native_backend.device),
        (torch.arange(n) % 50 == 0).to(native_backend.device, torch.int64),
    )
    assert_like_peer(boxes, scores, idxs, 0.3)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_any_order_of_the_threads(seed):
    boxes, scores, idxs = random_boxes(300, extent=150.0), torch.rand(300), torch.randint(0, 3, (300,))
    with emulated(thread_order_seed=seed):
        assert_like_peer(boxes, scores, idxs, 0.3)


def test_the_same_in_every_run_and_for_any_thread_count(native_backend):
    boxes, scores = random_boxes(600).to(native_backend.device), torch.rand(600).to(native_backend.device)
    idxs = torch.randint(0, 3, (600,))
    assert_same_in_every_run(lambda: ops.batched_nms(boxes, scores, idxs, 0.3))


@given(data=st.data(), n=st.integers(0, 90), classes=st.integers(1, 4))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@pytest.mark.parametrize("name", ["reference", "cpu", "emulated"])
def test_random_grids(name, data, n, classes):
    coordinates = data.draw(st.lists(st.integers(-3, 4), min_size=4 * n, max_size=4 * n))
    scores = torch.tensor(data.draw(st.lists(st.integers(0, 5), min_size=n, max_size=n))) / 5
    idxs = torch.tensor(data.draw(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n)), dtype=torch.int64)
    threshold = data.draw(st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 0.7, 1.0]))
    boxes = torch.tensor(coordinates, dtype=torch.float32).view(n, 4)
    backend = enter(name)
    next(backend)
    assert_like_peer(boxes, scores.float(), idxs, threshold)
    assert next(backend, None) is None


def test_raw_op(device):
    boxes, labels = random_boxes(2, 80).to(device), torch.randint(0, 3, (2, 80)).sort()[0].to(device)
    op = torch.ops.effdet_fast.nms.default
    for classes in (labels, None):
        torch.library.opcheck(op, (boxes, classes, 0.5, 80))
    torch.library.opcheck(op, (boxes[:, :0].contiguous(), None, 0.5, 1))
    for damaged in (boxes.mT.contiguous().mT, boxes[:, :, :3], boxes[0]):
        with pytest.raises(RuntimeError, match="nms: boxes must be contiguous"):
            op(damaged, None, 0.5, 80)
    with pytest.raises(RuntimeError, match="nms: labels must be contiguous int64"):
        op(boxes, labels.int(), 0.5, 80)


@pytest.mark.compiles
def test_compiled(device):
    """One graph, and one compilation for every number of boxes."""
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        single = torch.compile(ops.nms, fullgraph=True, dynamic=True, backend="aot_eager")
        batched = torch.compile(ops.batched_nms, fullgraph=True, dynamic=True)
        for n in (40, 77):
            boxes, scores, idxs = (x.to(device) for x in (grid_boxes(n), torch.rand(n), torch.randint(0, 3, (n,))))
            assert torch.equal(single(boxes, scores, 0.4).cpu(), peer_nms(boxes, scores, 0.4))
            assert torch.equal(batched(boxes, scores, idxs, 0.4).cpu(), peer_batched_nms(boxes, scores, idxs, 0.4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_takes_mixed_dtypes(native_backend, dtype):
    boxes, scores = grid_boxes(50).to(native_backend.device), torch.rand(50).to(native_backend.device, dtype)
    with torch.autocast(native_backend.device.type, dtype):
        assert torch.equal(ops.nms(boxes, scores, 0.4).cpu(), peer_nms(boxes, scores.float(), 0.4))


def test_inputs_that_require_a_gradient(backend):
    boxes, scores = (
        grid_boxes(20).to(backend.device).requires_grad_(),
        torch.rand(20, device=backend.device, requires_grad=True),
    )
    assert not ops.nms(boxes, scores, 0.5).requires_grad


BOXES, SCORES = torch.zeros(8, 4), torch.zeros(8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((BOXES[:, :3], SCORES, 0.5), ValueError, "nms: boxes must have shape [N, 4], got [8, 3]"),
        ((BOXES[0], SCORES, 0.5), ValueError, "nms: boxes must have shape [N, 4], got [4]"),
        ((BOXES, SCORES[:7], 0.5), ValueError, "nms: scores must have shape [8], got [7]"),
        ((BOXES, SCORES[:, None], 0.5), ValueError, "nms: scores must have shape [8], got [8, 1]"),
        ((BOXES.int(), SCORES, 0.5), TypeError, "nms: boxes must be float16, bfloat16, float32 or float64, got int32"),
        ((BOXES, SCORES.double(), 0.5), TypeError, "nms: scores must have the dtype of boxes, float32, got float64"),
        (([], SCORES, 0.5), TypeError, "nms: boxes must be a Tensor, got list"),
        ((BOXES, SCORES, NAN), ValueError, "nms: iou_threshold must be a number, got nan"),
        ((BOXES, SCORES, "0.5"), TypeError, "nms: iou_threshold must be a number, got str"),
        ((BOXES, SCORES.to("meta"), 0.5), ValueError, "nms: scores must be on the device of boxes, cpu, got meta"),
    ],
)
def test_errors_of_nms(arguments, error, message):
    with pytest.raises(error) as raised:
        ops.nms(*arguments)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("idxs", "error", "message"),
    [
        (torch.zeros(8), TypeError, "batched_nms: idxs must be an integer tensor, got float32"),
        (torch.zeros(7).long(), ValueError, "batched_nms: idxs must have shape [8], got [7]"),
        ([0] * 8, TypeError, "batched_nms: idxs must be a Tensor, got list"),
        (
            torch.zeros(8, device="meta").long(),
            ValueError,
            "batched_nms: idxs must be on the device of boxes, cpu, got meta",
        ),
    ],
)
def test_errors_of_batched_nms(idxs, error, message):
    with pytest.raises(error) as raised:
        ops.batched_nms(BOXES, SCORES, idxs, 0.5)
    assert str(raised.value) == message


def test_other_devices_take_the_reference():
    assert not _library.is_native(BOXES.to("meta"))


@pytest.mark.cuda
def test_more_boxes_than_a_whole_mask_would_allow():
    n = 150_000
    boxes, scores = random_boxes(n, extent=4000.0, size=40.0), torch.rand(n)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = ops.nms(boxes.cuda(), scores.cuda(), 0.5)
    assert torch.cuda.max_memory_allocated() - before < 64 << 20
    assert torch.equal(kept.cpu(), ops.nms(boxes, scores, 0.5))
