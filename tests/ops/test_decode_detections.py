"""decode_detections: candidates as of a stable sort, boxes as of the formula, and then batched_nms_padded."""

import itertools

import pytest
import torch
import torchvision

from effdet_fast import ops
from effdet_fast._choices import BOX_CODERS
from effdet_fast.ops.decode_detections import decode_candidates_reference
from tests.checks import all_equal, assert_same_in_every_run, captured
from tests.conftest import enter
from tests.emulation.backend import emulated
from tests.ops.test_nms import DTYPES, INF, NAN

LAYOUTS = [torch.contiguous_format, torch.channels_last]
SIZES = [(7, 5), (4, 3), (1, 2)]


def heads(
    batch=2, classes=3, per_cell=2, sizes=SIZES, dtype=torch.float32, layout=torch.contiguous_format, device="cpu"
):
    """Head outputs of a pyramid and its anchors. Logits are coarse, so that many are equal, also at the cut."""
    cls_outputs = [torch.randint(-12, 13, (batch, per_cell * classes, h, w)) / 4 for h, w in sizes]
    box_outputs = [torch.randn(batch, per_cell * 4, h, w) * 0.4 for h, w in sizes]
    count = per_cell * sum(h * w for h, w in sizes)
    corner = torch.rand(count, 2) * 100
    anchors = torch.cat([corner, corner + 10 + torch.rand(count, 2) * 30], 1)
    cls_outputs, box_outputs = (
        [x.to(device, dtype).to(memory_format=layout) for x in outputs] for outputs in (cls_outputs, box_outputs)
    )
    return cls_outputs, box_outputs, anchors.to(device)


def candidates(cls_outputs, box_outputs, anchors, classes, count, clip_sizes=None, box_coder="effdet"):
    """What the raw op finds."""
    dtype = torch.float64 if cls_outputs[0].dtype == torch.float64 else torch.float32
    clip_sizes = None if clip_sizes is None else clip_sizes.to(dtype)
    arguments = (cls_outputs, box_outputs, anchors.to(dtype), clip_sizes, classes, count, BOX_CODERS[box_coder])
    return torch.ops.effdet_fast.decode_candidates(*arguments)


def assert_same_candidates(cls_outputs, box_outputs, anchors, classes, count, clip_sizes=None, box_coder="effdet"):
    """Selection to the bit; boxes and scores against the float64 oracle."""
    arguments = (anchors, classes, count, clip_sizes, box_coder)
    boxes, scores, labels, indices = candidates(cls_outputs, box_outputs, *arguments)
    wide = [[x.double() for x in outputs] for outputs in (cls_outputs, box_outputs)]
    expected = decode_candidates_reference(*wide, anchors.double(), clip_sizes, classes, count, box_coder)
    assert torch.equal(labels, expected[2]) and torch.equal(indices, expected[3])
    rtol = 1e-12 if boxes.dtype == torch.float64 else 2e-6
    torch.testing.assert_close(scores.double(), expected[1], rtol=rtol, atol=0, equal_nan=True)
    torch.testing.assert_close(boxes.double(), expected[0], rtol=rtol, atol=100 * rtol, equal_nan=True)
    assert boxes.is_contiguous() and boxes.shape == (*labels.shape, 4)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
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
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_odd_sizes(native_backend, batch, classes, per_cell, sizes, layout):
    inputs = heads(batch, classes, per_cell, sizes, layout=layout, device=native_backend.device)
    assert_same_candidates(*inputs, classes, 37)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
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
    codes = box_outputs[0].permute(0, 2, 3, 1).reshape(-1, 4)
    effdet_boxes = anchors_of.decode_box_outputs(codes, anchors[:, [1, 0, 3, 2]], output_xyxy=True)
    coder = torchvision.models.detection._utils.BoxCoder((1.0, 1.0, 1.0, 1.0))
    for name, expected in (("effdet", effdet_boxes), ("torchvision", coder.decode_single(codes, anchors))):
        got = ops.decode_detections(
            *arguments, anchors.to(backend.device), num_classes=1, iou_threshold=1.0, max_detections=36, box_coder=name
        )
        assert got.counts.tolist() == [36]
        torch.testing.assert_close(got.boxes[0].cpu(), expected[got.indices[0].cpu()], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
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


def large_heads(batch, layout, device, ties):
    cls_outputs, box_outputs, anchors = heads(batch, 30, 9, [(40, 37), (20, 19)], layout=layout, device=device)
    if not ties:
        cls_outputs = [torch.randn_like(x) for x in cls_outputs]
    return cls_outputs, box_outputs, anchors


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
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
    for layout in LAYOUTS:
        assert_same_candidates([x.to(memory_format=layout) for x in cls_outputs], box_outputs, anchors, 40, 700)
    assert next(backend, None) is None


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_any_order_of_the_threads(seed):
    inputs = heads()
    with emulated(thread_order_seed=seed):
        assert_same_candidates(*inputs, 3, 60)


def test_the_same_in_every_run_and_for_any_thread_count(native_backend):
    if native_backend.name == "cpu":
        inputs, classes = large_heads(2, torch.channels_last, "cpu", True), 30
    else:
        inputs, classes = heads(device=native_backend.device), 3
    assert_same_in_every_run(lambda: ops.decode_detections(*inputs, num_classes=classes, max_candidates=70))


def test_raw_op(device):
    cls_outputs, box_outputs, anchors = heads(device=device)
    op = torch.ops.effdet_fast.decode_candidates.default
    for layout, clip_sizes in itertools.product(LAYOUTS, (None, torch.full((2, 2), 50.0, device=device))):
        in_layout = [[x.to(memory_format=layout) for x in outputs] for outputs in (cls_outputs, box_outputs)]
        torch.library.opcheck(op, (*in_layout, anchors, clip_sizes, 3, 40, BOX_CODERS["effdet"]))
    for changed, message in [
        (
            ([cls_outputs[0].transpose(2, 3).contiguous().transpose(2, 3)], box_outputs[:1], anchors[:70]),
            "outputs must be dense",
        ),
        ((cls_outputs, box_outputs[:2], anchors), "1 to 16 levels"),
        ((cls_outputs, [x.double() for x in box_outputs], anchors), "of one dtype"),
        ((cls_outputs, box_outputs, anchors[:-1]), "a row per anchor"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            op(*changed, None, 3, 40, BOX_CODERS["effdet"])
    with pytest.raises(RuntimeError, match="num_classes must divide"):
        op(cls_outputs, box_outputs, anchors, None, 4, 40, BOX_CODERS["effdet"])
    with pytest.raises(RuntimeError, match="box_coder must be a number from 1 to 2, got 0"):
        op(cls_outputs, box_outputs, anchors, None, 3, 40, 0)


@pytest.mark.compiles
@pytest.mark.parametrize("method", ["hard", "gaussian"])
def test_compiled(device, method):
    inputs = heads(device=device)
    options = {"num_classes": 3, "max_candidates": 60, "score_threshold": 0.5, "method": method}
    detect = torch.compile(ops.decode_detections, fullgraph=True, backend="aot_eager")
    assert all_equal(detect(*inputs, **options), ops.decode_detections(*inputs, **options))


def test_inputs_that_require_a_gradient(backend):
    cls_outputs, box_outputs, anchors = heads(device=backend.device)
    outputs = [[x.requires_grad_() for x in levels] for levels in (cls_outputs, box_outputs)]
    got = ops.decode_detections(*outputs, anchors, num_classes=3)
    assert not got.boxes.requires_grad and not got.scores.requires_grad


def test_half_precision_returns_float32(backend):
    inputs = heads(dtype=torch.bfloat16, device=backend.device)
    got = ops.decode_detections(*inputs, num_classes=3)
    assert got.boxes.dtype == got.scores.dtype == torch.float32


CLS, BOX, ANCHORS = heads()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (
            {"cls_outputs": CLS[:2]},
            ValueError,
            "cls_outputs and box_outputs must have 1 to 16 levels each, and as many, got 2 and 3",
        ),
        ({"cls_outputs": [CLS[0], CLS[1], None]}, TypeError, "cls_outputs[2] must be a Tensor, got NoneType"),
        (
            {"cls_outputs": [x.int() for x in CLS]},
            TypeError,
            "cls_outputs[0] must be float16, bfloat16, float32 or float64, got int32",
        ),
        (
            {"box_outputs": [x.half() for x in BOX]},
            TypeError,
            "box_outputs[0] must be float32 as cls_outputs[0], got float16",
        ),
        (
            {"num_classes": 4},
            ValueError,
            "cls_outputs[0] must have shape [B, A * num_classes, H, W], num_classes 4, got [2, 6, 7, 5]",
        ),
        ({"num_classes": 0}, ValueError, "num_classes must be an int >= 1, got 0"),
        (
            {"cls_outputs": [CLS[0], CLS[1][:, :3], CLS[2]]},
            ValueError,
            "cls_outputs[1] must have shape [2, 6, H, W], got [2, 3, 4, 3]",
        ),
        (
            {"box_outputs": [BOX[0], BOX[0], BOX[2]]},
            ValueError,
            "box_outputs[1] must have shape [2, 8, 4, 3], got [2, 8, 7, 5]",
        ),
        ({"anchors": ANCHORS[:-1]}, ValueError, "anchors must have shape [98, 4], got [97, 4]"),
        ({"clip_sizes": torch.zeros(2)}, ValueError, "clip_sizes must have shape [2, 2], got [2]"),
        ({"anchors": ANCHORS.to("meta")}, ValueError, "cls_outputs[0] must be on the device of anchors, meta, got cpu"),
        ({"max_candidates": 0}, ValueError, "max_candidates must be an int >= 1, got 0"),
        ({"max_detections": 0}, ValueError, "max_detections must be in [1, 1073741824], got 0"),
        ({"iou_threshold": NAN}, ValueError, "iou_threshold must be a number, got nan"),
        ({"score_threshold": "low"}, TypeError, "score_threshold must be a number, got str"),
        ({"box_coder": "yolo"}, ValueError, "box_coder must be one of 'effdet', 'torchvision', got 'yolo'"),
        ({"method": "soft"}, ValueError, "method must be one of 'hard', 'gaussian', 'linear', got 'soft'"),
        ({"sigma": -1}, ValueError, "sigma must be above 0, got -1.0"),
    ],
)
def test_errors(changed, error, message):
    arguments = {"cls_outputs": CLS, "box_outputs": BOX, "anchors": ANCHORS, "num_classes": 3}
    with pytest.raises(error) as raised:
        ops.decode_detections(**{**arguments, **changed})
    assert str(raised.value) == f"decode_detections: {message}"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_never_waits_and_can_be_captured():
    cls_outputs, box_outputs, anchors = large_heads(4, torch.channels_last, "cuda", True)
    graph, found = captured(lambda: ops.decode_detections(cls_outputs, box_outputs, anchors, num_classes=30))
    for x in cls_outputs:
        x.copy_(torch.randn_like(x))
    graph.replay()
    assert all_equal(found, ops.decode_detections(cls_outputs, box_outputs, anchors, num_classes=30))
