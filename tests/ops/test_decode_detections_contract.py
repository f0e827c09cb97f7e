"""What decode_detections promises besides its detections: determinism, compilation, dtypes, errors, no waiting."""

import itertools

import pytest
import torch

from effdet_fast import ops
from effdet_fast._choices import BOX_CODERS
from tests.checks import LAYOUTS, all_equal, assert_same_in_every_run, captured
from tests.emulation.backend import emulated
from tests.ops.head_outputs import assert_same_candidates, heads, large_heads

NAN = float("nan")


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
    for layout, clip_sizes in itertools.product(LAYOUTS.values(), (None, torch.full((2, 2), 50.0, device=device))):
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
def test_never_waits_and_can_be_captured():
    cls_outputs, box_outputs, anchors = large_heads(4, torch.channels_last, "cuda", True)
    graph, found = captured(lambda: ops.decode_detections(cls_outputs, box_outputs, anchors, num_classes=30))
    for x in cls_outputs:
        x.copy_(torch.randn_like(x))
    graph.replay()
    assert all_equal(found, ops.decode_detections(cls_outputs, box_outputs, anchors, num_classes=30))
