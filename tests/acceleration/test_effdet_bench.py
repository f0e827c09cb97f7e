"""Accelerated effdet benches: labels, losses and detections are effdet's."""

from __future__ import annotations

import copy
import pickle

import effdet
import pytest
import torch
from effdet.anchors import AnchorLabeler, Anchors
from effdet.bench import DetBenchPredict, DetBenchTrain
from effdet.loss import DetectionLoss
from torch import nn

import effdet_fast
from tests.acceleration.effdet_benches import CLASSES, targets
from tests.checks import all_equal

SIZE = (96, 160)


class Outputs(nn.Module):
    """What stands for a model in a bench: head outputs as parameters, with objects that several anchors found."""

    def __init__(self, batch: int = 3, seed: int = 0, **options) -> None:
        super().__init__()
        config = effdet.get_efficientdet_config("tf_efficientdet_d0")
        for name, value in {
            "image_size": SIZE,
            "num_classes": CLASSES,
            "max_detection_points": 1000,
            **options,
        }.items():
            config[name] = value
        self.config = config
        generator = torch.Generator().manual_seed(seed)
        sizes = Anchors.from_config(config).feat_sizes[config.min_level :]
        shapes = [(batch, 9 * values, *size) for values in (config.num_classes, 4) for size in sizes]
        values = [torch.randn(shape, generator=generator) for shape in shapes]
        self.cls = nn.ParameterList(x - 2 for x in values[: len(sizes)])
        self.box = nn.ParameterList(x * 0.3 for x in values[len(sizes) :])

    def forward(self, x: torch.Tensor):
        return list(self.cls), list(self.box)


def pair(bench, *options, **fields):
    plain = bench(Outputs(**fields), *options)
    ours = copy.deepcopy(plain)
    effdet_fast.accelerate(ours)
    return ours, plain


def losses_and_gradients(bench, target):
    bench.zero_grad()
    losses = bench(torch.zeros(3, 3, *SIZE), target)
    losses["loss"].backward()
    return losses, [parameter.grad for parameter in bench.parameters()]


def assert_same_losses(ours, plain, target):
    (losses, gradients), (expected, expected_gradients) = (losses_and_gradients(b, target) for b in (ours, plain))
    assert list(losses) == list(expected)
    assert expected["class_loss"] > 1
    for name, value in expected.items():
        assert losses[name].dtype == value.dtype
        torch.testing.assert_close(losses[name], value, rtol=1e-5, atol=1e-3 if name == "detections" else 1e-6)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-6)


def swapped(module):
    return {row.replacement for row in effdet_fast.accelerate(copy.deepcopy(module)).swapped}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1},
        {"jit_loss": True},
        {"gamma": 0.0, "alpha": 0.5, "delta": 0.3, "box_loss_weight": 1.0},
    ],
)
def test_losses_and_their_gradients(options, training):
    ours, plain = pair(DetBenchTrain, **options)
    assert "detection_loss" in swapped(plain)
    assert_same_losses(ours.train(training), plain.train(training), targets(3, SIZE))


def test_a_loss_without_an_op_stays():
    ours, plain = pair(DetBenchTrain, legacy_focal=True)
    report = effdet_fast.accelerate(copy.deepcopy(plain))
    assert {row.reason for row in report.left_alone} == {"legacy_focal"}
    assert_same_losses(ours, plain, targets(3, SIZE))


@pytest.mark.parametrize("name", ["alpha", "gamma", "delta", "label_smoothing", "box_loss_weight"])
def test_a_loss_out_of_range_stays(name):
    plain = DetectionLoss(Outputs(**{name: -0.5}).config)
    assert [row.reason for row in effdet_fast.accelerate(plain).left_alone] == [f"{name} -0.5"]


def test_targets_labeled_by_the_loader():
    """With anchors to ignore, and the numbers of positives in a shape of its own."""
    ours, plain = pair(DetBenchTrain, False)
    assert ours.anchor_labeler is None
    labeler = AnchorLabeler(plain.anchors, CLASSES)
    target = targets(3, SIZE)
    classes, deltas, positives = labeler.batch_label_anchors(target["bbox"], target["cls"])
    classes[0][:, :2] = -2
    labeled = {f"label_cls_{level}": x for level, x in enumerate(classes)}
    labeled |= {f"label_bbox_{level}": x for level, x in enumerate(deltas)}
    labeled["label_num_positives"] = positives.unsqueeze(1)
    assert_same_losses(ours, plain, labeled)


@pytest.mark.parametrize("form", ["padded", "lists"])
def test_labels(form):
    """Objects of class 0 are matched and told to be background; images may have no rows that count, or none at all."""
    target = targets(4, SIZE, rows=12)
    boxes, classes = target["bbox"], target["cls"]
    classes[3, 4] = 0
    if form == "lists":
        boxes = [rows[: 12 - 4 * image] for image, rows in enumerate(boxes)]
        classes = [rows[: 12 - 4 * image] for image, rows in enumerate(classes)]
        boxes[3], classes[3] = target["bbox"][3], target["cls"][3]
    plain = AnchorLabeler(Anchors.from_config(Outputs().config), CLASSES)
    bench = DetBenchTrain(Outputs())
    assert "match_anchors" in {row.replacement for row in effdet_fast.accelerate(bench).swapped}
    expected = plain.batch_label_anchors(boxes, classes)
    found = bench.anchor_labeler.batch_label_anchors(boxes, classes)
    assert expected[2].sum() > 20 and expected[2].tolist()[1] == 0
    assert torch.equal(found[2], expected[2])
    for ours, theirs in zip(found[0], expected[0], strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_labels_of_no_image_with_objects():
    bench = DetBenchTrain(Outputs())
    effdet_fast.accelerate(bench)
    boxes, classes = [torch.zeros(0, 4)] * 2, [torch.zeros(0, dtype=torch.long)] * 2
    labels, deltas, positives = bench.anchor_labeler.batch_label_anchors(boxes, classes)
    assert all((x == -1).all() for x in labels) and not any(x.any() for x in deltas) and positives.tolist() == [0, 0]


def test_rows_that_are_not_filtered_count():
    """Then the op would drop what effdet keeps."""
    bench, plain = pair(DetBenchTrain)
    target = targets(2, SIZE)
    target["bbox"][1] = target["bbox"][0]
    expected = plain.anchor_labeler.batch_label_anchors(target["bbox"], target["cls"], filter_valid=False)
    found = bench.anchor_labeler.batch_label_anchors(target["bbox"], target["cls"], filter_valid=False)
    assert expected[2][1] > 0 and torch.equal(found[2], expected[2])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda labeler: setattr(labeler.target_assigner, "_box_coder", None), "its matcher or box coder was replaced"),
        (lambda labeler: setattr(labeler.target_assigner._matcher, "_unmatched_threshold", 0.0), "match threshold 0.0"),
        (lambda labeler: setattr(labeler.target_assigner._box_coder, "_scale_factors", [1.0] * 4), "scaled box deltas"),
    ],
)
def test_other_labelers_are_left_alone(change, reason):
    bench = DetBenchTrain(Outputs())
    change(bench.anchor_labeler)
    report = effdet_fast.accelerate(bench, only=["anchor_matching"])
    assert [(row.path, row.reason) for row in report.rows] == [("anchor_labeler", reason)]


def test_other_thresholds_are_the_labelers_own():
    bench, plain = pair(DetBenchTrain)
    target = targets(2, SIZE)
    for each in (bench, plain):
        each.anchor_labeler.target_assigner._matcher._matched_threshold = 0.7
        each.anchor_labeler.target_assigner._matcher._unmatched_threshold = 0.3
    found, expected = (b.anchor_labeler.batch_label_anchors(target["bbox"], target["cls"]) for b in (bench, plain))
    assert all_equal(found[0], expected[0])
    assert torch.equal(found[2], expected[2])


def detections(bench, info):
    with torch.no_grad():
        return bench(torch.zeros(3, 3, *SIZE), info)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("info", ["none", "scale", "scale and size"])
@pytest.mark.parametrize("max_detections", [20, 100])
def test_detections(soft, info, max_detections):
    """The same boxes in the same order, padded alike. Unclipped boxes reach out of the image.

    effdet's soft-NMS moves the boxes of each class further out, where overlaps of the last classes are visibly rounded.
    """
    ours, plain = pair(DetBenchPredict, soft_nms=soft, max_det_per_image=max_detections, num_classes=90)
    for bench in (ours, plain):
        for logits in bench.model.cls:
            logits.data.unflatten(1, (9, 90))[:, :, 85:] += 3
    assert "decode_detections" in swapped(plain)
    target = targets(3, SIZE)
    img_info = None if info == "none" else {"img_scale": target["img_scale"], "img_size": None}
    if info == "scale and size":
        img_info["img_size"] = target["img_size"].round().long()
    found, expected = detections(ours, img_info), detections(plain, img_info)
    assert found.shape == expected.shape == (3, max_detections, 6) and found.dtype == expected.dtype
    assert (expected[..., 5].unique().numel() > 3) and (info == "scale and size" or expected[..., 0].min() < 0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("soft", [False, True])
def test_fewer_detections_than_rows(soft):
    """Rows of zeros follow; of candidates that all are below soft-NMS's threshold, the best stays."""
    ours, plain = pair(DetBenchPredict, soft_nms=soft, max_detection_points=15)
    for bench in (ours, plain):
        for logits in bench.model.cls:
            logits.data[0] -= 12
    found, expected = detections(ours, None), detections(plain, None)
    counts = (expected[..., 5] > 0).sum(1)
    assert counts.max() < 20 and (counts[0] == 1 if soft else counts[0] > 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)


def test_detections_of_half_precision():
    ours, plain = pair(DetBenchPredict)
    for bench in (ours, plain):
        bench.model.bfloat16()
    found, expected = detections(ours, None), detections(plain, None)
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found[..., 4], expected[..., 4], rtol=0.01, atol=0)


@pytest.mark.parametrize("bench", [DetBenchTrain, DetBenchPredict])
def test_a_bench_compiles_without_a_graph_break(bench):
    module, _ = pair(bench)
    module.eval()
    target = targets(3, SIZE)
    if bench is DetBenchTrain:
        expected = losses_and_gradients(module, target)
        found = losses_and_gradients(torch.compile(module, backend="aot_eager", fullgraph=True), target)
    else:
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        expected, found = detections(module, target), detections(compiled, target)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trip", [copy.deepcopy, lambda bench: pickle.loads(pickle.dumps(bench))])
def test_copies_and_restoring(trip):
    bench, plain = pair(DetBenchTrain)
    other = trip(bench)
    assert type(other) is type(bench) and type(other.anchor_labeler) is type(bench.anchor_labeler)
    assert other.anchor_labeler.anchors is other.anchors
    assert_same_losses(other, plain, targets(3, SIZE))
    effdet_fast.restore(other)
    assert type(other) is DetBenchTrain and type(other.anchor_labeler) is AnchorLabeler
    assert type(other.loss_fn) is DetectionLoss
    assert list(other.state_dict()) == list(plain.state_dict())


def test_families_can_be_chosen():
    for family in ("nms", "detection_loss", "anchor_matching"):
        bench, plain = DetBenchTrain(Outputs()), DetBenchTrain(Outputs())
        assert {row.family for row in effdet_fast.accelerate(bench, only=[family]).swapped} == {family}
        assert_same_losses(bench.eval(), plain.eval(), targets(3, SIZE))


@pytest.mark.parametrize("box", [(20.0, 30, 20, 60), (20.0, 30, 50, 30), (0.0, 0, 0, 0)])
def test_a_box_without_area_is_an_object_as_in_effdet(box):
    """It takes the first anchor, with a small delta for its side."""
    ours, plain = pair(DetBenchTrain)
    target = targets(3, SIZE)
    target["bbox"][0, 1], target["cls"][0, 1] = torch.tensor(box), 3
    target["bbox"][1, 0], target["cls"][1, 0] = torch.tensor(box), 5
    labels, deltas, positives = plain.anchor_labeler.batch_label_anchors(target["bbox"], target["cls"])
    assert positives[1] == 1 and labels[0].flatten(1)[1, 0] == 4
    for actual, expected in zip(
        ours.anchor_labeler.batch_label_anchors(target["bbox"], target["cls"]), (labels, deltas, positives), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert_same_losses(ours.train(), plain.train(), target)
