"""Every op's benchmark, with tiny shapes: ours and all peers compute the same, and the bytes are the fewest possible."""

import importlib
import warnings

import pytest
import torch

from benchmarks import (
    BENCHMARKS,
    bench_anchor_matching,
    bench_batch_norm_act,
    bench_decode_detections,
    bench_depthwise_conv,
    bench_detection_loss,
    bench_focal_loss,
    bench_fusion,
    bench_nms,
    bench_soft_nms,
    bench_squeeze_excite,
    bench_training_step,
    smoke,
)
from benchmarks.harness import passing
from benchmarks.workload import CHANNELS_LAST, CONTIGUOUS, OURS
from effdet_fast import create_model
from effdet_fast.ops._library import SCHEMAS
from tests.ops.valid_calls import Recorder

CPU = torch.device("cpu")
BOTH_LAYOUTS = (CONTIGUOUS, CHANNELS_LAST)
ALL_PHASES = ("forward", "backward", "both")


def check(workload, dtype, peers: set[str]) -> None:
    """Compiled peers are left to the benchmark itself: they are the same functions, and slow to compile."""
    assert {peer.name for peer in workload.peers} >= peers
    workload.peers = [peer for peer in workload.peers if "compile" not in peer.name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, errors, problems = passing(workload, dtype)
    assert problems == {} and set(errors) == {OURS, *(peer.name for peer in workload.peers)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_focal_loss(dtype, monkeypatch):
    monkeypatch.setattr(bench_focal_loss, "ANCHORS", 500)
    workload = bench_focal_loss.labels(CPU, dtype, CONTIGUOUS, batch=2, gamma=1.5)
    logits = 2 * 500 * 90 * dtype.itemsize
    assert workload.bytes == {"forward": logits + 8000, "backward": 2 * logits + 8000, "both": 2 * logits + 8000}
    check(workload, dtype, {"eager", "torch.compile", "torchvision", "torchvision, compiled", "effdet"})


@pytest.mark.parametrize("layout", BOTH_LAYOUTS)
def test_focal_loss_of_soft_targets(layout):
    workload = bench_focal_loss.soft_targets(CPU, torch.float32, layout, batch=1, gamma=2.0, size=4)
    assert workload.ours.leaves[0].is_contiguous() == (layout == CONTIGUOUS)
    check(workload, torch.float32, {"eager", "torchvision", "effdet"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", BOTH_LAYOUTS)
def test_detection_loss(layout, dtype):
    workload = bench_detection_loss.pyramid(CPU, dtype, layout, batch=2, sizes=(4, 3))
    anchors = 2 * 9 * (16 + 9)
    outputs = anchors * 94 * dtype.itemsize
    assert workload.bytes == {"forward": outputs + anchors * 24, "both": 2 * outputs + anchors * 24}
    assert workload.ours.leaves[0].is_contiguous() == (layout == CONTIGUOUS)
    check(workload, dtype, {"effdet", "effdet, compiled"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", BOTH_LAYOUTS)
@pytest.mark.parametrize("resample, transfers", [(bench_fusion.TOP_DOWN, 5.75), (bench_fusion.BOTTOM_UP, 20)])
def test_fusion(resample, transfers, layout, dtype):
    workload = bench_fusion.node(CPU, dtype, layout, batch=2, channels=8, size=8, resample=resample)
    assert workload.bytes["both"] == transfers * 2 * 8 * 8 * 8 * dtype.itemsize
    check(workload, dtype, {"eager", "torch.compile", "effdet", "effdet, compiled"})


@pytest.mark.parametrize("layout", BOTH_LAYOUTS)
@pytest.mark.parametrize("kernel, stride, prologue", [(3, 1, None), (5, 1, None), (3, 2, None), (5, 2, "silu")])
def test_depthwise_conv(kernel, stride, prologue, layout):
    shape = dict(batch=2, channels=8, kernel=kernel, stride=stride, size=12)
    workload = bench_depthwise_conv.depthwise(CPU, torch.float32, layout, **shape, prologue=prologue)
    read, written = 2 * 8 * 144 * 4, 2 * 8 * 144 * 4 // stride**2
    assert workload.bytes == {"forward": read + written, "backward": 2 * read + written, "both": 3 * read + 2 * written}
    has_onednn = stride == 1 and prologue is None
    check(workload, torch.float32, {"eager", "torch.compile"} | ({"oneDNN"} if has_onednn else set()))


def test_depthwise_conv_over_levels():
    workload = bench_depthwise_conv.levels(CPU, torch.float32, CHANNELS_LAST, batch=2, channels=8, sizes=(6, 3, 1))
    maps = 2 * 8 * (36 + 9 + 1) * 4
    assert workload.bytes == {"forward": 2 * maps, "backward": 3 * maps, "both": 5 * maps}
    check(workload, torch.float32, {"eager", "torch.compile", "oneDNN"})


def test_separable_conv():
    check(
        bench_depthwise_conv.separable(CPU, torch.bfloat16, CHANNELS_LAST, batch=2, channels=8, size=12),
        torch.bfloat16,
        {"eager", "torch.compile"},
    )


@pytest.mark.parametrize("layout", BOTH_LAYOUTS)
@pytest.mark.parametrize("training, activation, transfers", [(True, "silu", 8), (True, None, 8), (False, "silu", 7)])
def test_batch_norm_act(training, activation, transfers, layout):
    options = dict(batch=2, channels=8, size=6, activation=activation, training=training)
    workload = bench_batch_norm_act.norm(CPU, torch.float32, layout, **options)
    assert workload.bytes["both"] == transfers * 2 * 8 * 36 * 4
    check(workload, torch.float32, {"eager", "torch.compile"})


def test_nms():
    workload = bench_nms.padded(CPU, torch.float32, CONTIGUOUS, batch=2, count=400)
    assert workload.phases == ("forward",) and workload.bytes == {"forward": 2 * 400 * (16 + 4 + 8)}
    kept = workload.oracle.forward()[1]
    assert (kept > 20).all() and (kept <= 100).all()
    check(workload, torch.float32, {"torchvision"})
    check(bench_nms.single(CPU, torch.float32, CONTIGUOUS, count=300), torch.float32, {"torchvision"})


def test_soft_nms():
    workload = bench_soft_nms.padded(CPU, torch.float32, CONTIGUOUS, batch=2, count=300)
    assert workload.phases == ("forward",) and (workload.oracle.forward()[1] == 100).all()
    check(workload, torch.float32, {"effdet"})
    check(bench_soft_nms.single(CPU, torch.float32, CONTIGUOUS, count=200), torch.float32, {"effdet"})


def test_anchor_matching():
    workload = bench_anchor_matching.effdet_rule(CPU, torch.float32, CONTIGUOUS, batch=2, max_boxes=6)
    assert workload.bytes == {"forward": 49104 * 16 + 2 * 6 * 24 + 2 * (49104 * 24 + 4)}
    assert workload.oracle.forward()[0].tolist()[0] == 0 and workload.oracle.forward()[0][1] > 5
    check(workload, torch.float32, {"effdet"})
    workload = bench_anchor_matching.retinanet_rule(CPU, torch.float32, CONTIGUOUS, batch=2, max_boxes=6)
    check(workload, torch.float32, {"torchvision"})


@pytest.mark.parametrize("layout", BOTH_LAYOUTS)
def test_decode_detections(layout, monkeypatch):
    monkeypatch.setattr(bench_decode_detections, "CANDIDATES", 400)
    workload = bench_decode_detections.d0(CPU, torch.float32, layout, batch=2, image=128)
    anchors = 9 * (256 + 64 + 16 + 4 + 1)
    assert workload.bytes == {"forward": 2 * anchors * (90 + 4) * 4}
    check(workload, torch.float32, {"eager", "effdet"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", BOTH_LAYOUTS)
def test_squeeze_excite(layout, dtype):
    workload = bench_squeeze_excite.excite(CPU, dtype, layout, batch=2, channels=24, size=9, squeezed=6)
    tensor = 2 * 24 * 81 * dtype.itemsize
    assert workload.bytes == {"forward": 3 * tensor, "backward": 4 * tensor, "both": 7 * tensor}
    check(workload, dtype, {"eager", "torch.compile"} | ({"timm"} if dtype == torch.float32 else set()))


def test_candidates_overlap_and_have_scores_of_their_own():
    boxes, scores, labels = bench_nms.candidates(2, 1000, CPU, torch.float32)
    assert (boxes[..., 2:] >= boxes[..., :2]).all() and boxes.min() >= 0 and boxes.max() <= 512
    assert all(row.unique().numel() == 1000 for row in scores)
    assert labels.min() >= 0 and labels.max() < 90


@pytest.mark.slow  # the oracle of a whole model
@pytest.mark.parametrize(
    "build, name, peer",
    [
        (bench_training_step.efficientdet, "efficientdet_d0", "effdet"),
        (bench_training_step.retinanet, "retinanet_resnet18_fpn", "torchvision"),
    ],
)
def test_training_step(build, name, peer, one_thread):
    workload = build(CPU, torch.float32, CHANNELS_LAST, name=name, batch=2, size=128)
    trained = [parameter for parameter in create_model(name).parameters() if parameter.requires_grad]
    assert workload.phases == ("step",) and workload.images == 2
    assert workload.absent.pop("effdet_fast, graphed") == "needs a GPU"
    assert len(workload.ours.leaves) == len(trained)
    check(workload, torch.float32, {peer, f"effdet_fast on {peer}"})
    for implementation in (workload.ours, *workload.peers):
        if "compiled" not in implementation.name:
            before = [parameter.detach().clone() for parameter in implementation.leaves]
            implementation.step()
            changed = [not torch.equal(a, b) for a, b in zip(before, implementation.leaves, strict=True)]
            assert sum(changed) > 0.9 * len(changed)


@pytest.mark.slow  # the oracle of a whole model
def test_training_step_of_a_classifier(one_thread):
    workload = bench_training_step.classifier(
        CPU, torch.float32, CHANNELS_LAST, name="efficientnet_b0", batch=2, size=64
    )
    assert workload.phases == ("step",) and workload.images == 2
    check(workload, torch.float32, {"timm"})


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("op", BENCHMARKS)
def test_cases_are_named_once_and_say_what_they_support(op, device_type):
    module = importlib.import_module(f"benchmarks.bench_{op}")
    found = module.cases(device_type)
    assert module.OP == op and found and len({case.name for case in found}) == len(found)
    assert all(
        case.layouts and set(case.layouts) <= set(BOTH_LAYOUTS) and torch.float32 in case.dtypes for case in found
    )


def test_the_small_set_for_the_sanitizer_has_every_op():
    with Recorder() as recorder:
        smoke.main("cpu")
    assert set(SCHEMAS) - {op._schema.name.partition("::")[2] for op, _ in recorder.calls} == {"batch_norm_stats"}
