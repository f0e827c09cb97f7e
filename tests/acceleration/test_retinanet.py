"""An accelerated torchvision RetinaNet trains and detects as before."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torchvision.models.detection import retinanet as torchvision_retinanet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNet, RetinaNetClassificationHead, RetinaNetRegressionHead

import effdet_fast
from effdet_fast.acceleration import retinanet
from tests.checks import distance
from tests.models.torchvision_models import peer_model, randomise

SIZE, CLASSES = (32, 64), 7
LEVELS = [(4, 8), (2, 4), (1, 2), (1, 1), (1, 1)]
SMALL = ["retinanet_resnet18_fpn", "retinanet_resnet18_fpn_v2"]
PUBLISHED = ["retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2"]
NAMES = [SMALL[1], *(pytest.param(name, marks=pytest.mark.slow) for name in (SMALL[0], *PUBLISHED))]
SWAPPED = {("", "detection_loss"), ("", "nms"), ("head.classification_head", "focal_loss")}


@functools.cache
def _cached(name):
    if name in PUBLISHED:
        options = {"weights": None, "weights_backbone": None, "min_size": min(SIZE), "max_size": max(SIZE)}
        model = getattr(torchvision_retinanet, name)(num_classes=CLASSES, **options)
    else:
        model = peer_model(name, SIZE, CLASSES)
    randomise(model)
    return model


def plain_model(name=SMALL[0]):
    return copy.deepcopy(_cached(name))


def accelerated(model):
    model = copy.deepcopy(model)
    effdet_fast.accelerate(model)
    return model


def batch(dtype=torch.float32):
    """Two images of different sizes; the second shows nothing."""
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, *size, generator=generator).to(dtype) for size in (SIZE, (40, 50))]
    boxes = [[[8.0, 5, 50, 30], [14, 4, 56, 30], [30, 5, 60, 28], [2, 2, 20, 16]], torch.zeros(0, 4)]
    labels = [[1, 6, 0, 3], []]
    return images, [
        {"boxes": torch.as_tensor(b, dtype=dtype), "labels": torch.tensor(k, dtype=torch.int64)}
        for b, k in zip(boxes, labels, strict=True)
    ]


def train(model, dtype=torch.float32):
    """Losses, gradients of their sum, buffers after it."""
    model = copy.deepcopy(model).to(dtype).train()
    losses = model(*batch(dtype))
    assert list(losses) == ["classification", "bbox_regression"]
    sum(losses.values()).backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.requires_grad}
    return {key: loss.detach() for key, loss in losses.items()}, gradients, dict(model.named_buffers())


@pytest.fixture
def calls(monkeypatch):
    """The names of the ops that the swaps call."""
    names = []

    def spy(name, function):
        return lambda *args, **kwargs: (names.append(name), function(*args, **kwargs))[1]

    for name in ("match_anchors", "detection_loss", "decode_detections", "sigmoid_focal_loss"):
        monkeypatch.setattr(retinanet, name, spy(name, getattr(retinanet, name)))
    return names


@pytest.mark.parametrize("name", NAMES)
def test_losses_gradients_and_statistics_stay(name, calls, one_thread):
    """They are equal in float64; in float32 they are as near to that as the original's.

    Rounding decides on which side of a ReLU's kink a value falls, which moves gradients by up to a hundredth, in either model.
    """
    plain = plain_model(name)
    model = accelerated(plain)
    exact, actual = train(plain, torch.float64), train(model, torch.float64)
    torch.testing.assert_close(actual, exact, rtol=1e-8, atol=1e-10)
    assert min(exact[0].values()) > 0.1
    single, expected = train(model), train(plain)
    for values, original, truth, slack in zip(single, expected, exact, (1e-6, 0.02, 1e-6), strict=True):
        assert distance(values, truth) <= 2 * distance(original, truth) + slack
    assert calls == ["match_anchors", "detection_loss"] * 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_detections_stay(name, dtype, calls, one_thread):
    plain = plain_model(name).to(dtype).eval()
    model = accelerated(plain)
    images, _ = batch(dtype)
    with torch.no_grad():
        found, expected = model(images), plain(images)
    assert calls == ["decode_detections"]
    assert len(found) == 2
    for each, wanted in zip(found, expected, strict=True):
        assert list(each) == ["boxes", "scores", "labels"]
        assert len(wanted["labels"]) > 20
        assert torch.equal(each["labels"], wanted["labels"])
        for key, tolerance in (("boxes", 1e-3), ("scores", 1e-5)):
            torch.testing.assert_close(each[key], wanted[key], rtol=0, atol=tolerance)


def test_limits_and_thresholds_of_detections_hold(calls):
    plain = plain_model().eval()
    plain.detections_per_img, plain.topk_candidates, plain.score_thresh, plain.nms_thresh = 11, 9, 0.2, 0.3
    images, _ = batch()
    with torch.no_grad():
        found, expected = accelerated(plain)(images), plain(images)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)
    assert max(len(each["labels"]) for each in found) == 11
    plain.score_thresh = 1.0
    with torch.no_grad():
        found, expected = accelerated(plain)(images), plain(images)
    torch.testing.assert_close(found, expected)
    assert [each["boxes"].shape for each in found] == [(0, 4)] * 2
    assert calls == ["decode_detections"] * 2


def test_a_gradient_of_detections_stays():
    plain = plain_model().eval()
    gradients = []
    for model in (plain, accelerated(plain)):
        model.zero_grad()
        found = model(batch()[0])
        sum(each["boxes"].mean() + each["scores"].sum() for each in found).backward()
        gradients.append(model.head.regression_head.bbox_reg.weight.grad)
    assert gradients[0].norm() > 0 and torch.equal(*gradients)


@functools.cache
def _head_outputs(autocast):
    """What the model's parts hand to `compute_loss` for the batch: targets, head outputs, anchors."""
    model = plain_model().train()
    handed = []
    model.compute_loss = lambda *args: handed.extend(args) or {}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(*batch())
    return handed


def loss_of_outputs(model, autocast=False, dtype=None):
    """Losses, and their gradients with respect to the head outputs."""
    targets, outputs, anchors = _head_outputs(autocast)
    outputs = {key: output.detach().to(dtype).requires_grad_() for key, output in outputs.items()}
    targets = [{key: v.to(dtype) if v.is_floating_point() else v for key, v in each.items()} for each in targets]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype is None):
        losses = model.compute_loss(targets, outputs, [each.to(dtype) for each in anchors])
    gradients = torch.autograd.grad(sum(losses.values()), list(outputs.values()))
    return {key: loss.detach() for key, loss in losses.items()}, dict(zip(outputs, gradients, strict=True))


def detections_of_outputs(model):
    _, outputs, anchors = _head_outputs(False)
    counts = [9 * height * width for height, width in LEVELS]
    outputs = {key: list(output.split(counts, 1)) for key, output in outputs.items()}
    return model.postprocess_detections(outputs, [list(each.split(counts)) for each in anchors], [SIZE] * len(anchors))


@pytest.mark.parametrize("box_loss", ["l1", "smooth_l1", "giou"])
@pytest.mark.parametrize("low_quality", [True, False])
def test_box_losses_and_matching_rules(box_loss, low_quality, calls):
    plain = plain_model()
    plain.head.regression_head._loss_type = box_loss
    plain.proposal_matcher.allow_low_quality_matches = low_quality
    losses, expected = (loss_of_outputs(model) for model in (accelerated(plain), plain))
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-7)
    assert calls == ["match_anchors", "detection_loss"]


def test_images_without_any_object(calls):
    plain = plain_model()
    targets, outputs, anchors = _head_outputs(False)
    targets = [targets[1]] * len(targets)
    losses, expected = (model.compute_loss(targets, outputs, anchors) for model in (accelerated(plain), plain))
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    assert losses["bbox_regression"] == 0
    assert calls == ["match_anchors", "detection_loss"]


def test_the_class_loss_of_the_head_alone(calls):
    plain = plain_model().head.classification_head
    head = accelerated(plain)
    generator = torch.Generator().manual_seed(0)
    matches = [torch.randint(-2, count, (50,), generator=generator) for count in (4, 0)]
    values, gradients = [], []
    for each in (head, plain):
        logits = torch.randn(2, 50, CLASSES, generator=torch.Generator().manual_seed(2)).requires_grad_()
        loss = each.compute_loss(batch()[1], {"cls_logits": logits}, matches)
        values.append(loss)
        gradients.append(*torch.autograd.grad(loss, logits))
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*gradients)
    assert calls == ["sigmoid_focal_loss"] * 2


def test_bfloat16_autocast_and_channels_last():
    plain = plain_model()
    results = []
    for model in (plain, accelerated(plain)):
        model = model.to(memory_format=torch.channels_last).train()
        with torch.autocast("cpu", torch.bfloat16):
            losses = model(*batch())
        sum(losses.values()).backward()
        # oneDNN's bfloat16 weight gradient of a convolution to a single pixel is now and then no number, here as there.
        gradients = {key: p.grad for key, p in model.named_parameters() if "extra_blocks.p7" not in key}
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found = model.eval()(batch()[0])
        results.append(({key: loss.detach() for key, loss in losses.items()}, gradients, found))
    (original, expected_gradients, expected), (ours, gradients, found) = results
    torch.testing.assert_close(ours, original, rtol=0.02, atol=0)
    assert distance(gradients, expected_gradients) < 0.05
    for each, wanted in zip(found, expected, strict=True):
        assert [value.dtype for value in each.values()] == [value.dtype for value in wanted.values()]
        assert len(each["labels"]) == pytest.approx(len(wanted["labels"]), rel=0.2)


def test_the_loss_of_bfloat16_outputs_is_no_further_from_float64_than_the_originals():
    plain = plain_model()
    exact = loss_of_outputs(plain, autocast=True, dtype=torch.float64)
    for ours, original, truth in zip(
        loss_of_outputs(accelerated(plain), autocast=True), loss_of_outputs(plain, autocast=True), exact, strict=True
    ):
        assert distance(ours, truth) <= 2 * distance(original, truth)


def test_the_loss_compiles_without_a_graph_break():
    plain = plain_model()
    model = accelerated(plain)
    targets, outputs, anchors = _head_outputs(False)
    outputs = {key: output.detach().requires_grad_() for key, output in outputs.items()}
    results = []
    for loss in (torch.compile(model.compute_loss, backend="aot_eager", fullgraph=True), plain.compute_loss):
        losses = loss(targets, outputs, anchors)
        results.append((losses, torch.autograd.grad(sum(losses.values()), list(outputs.values()))))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_no_more_graph_breaks_than_torchvisions_own(training):
    """Those of the transform that resizes images, and in eval mode the one for how many detections there are."""
    plain = plain_model()
    inputs = batch() if training else batch()[:1]
    counts, places = [], set()
    for model in (plain, accelerated(plain)):
        torch._dynamo.reset()
        with torch.set_grad_enabled(training):
            explanation = torch._dynamo.explain(model.train(training))(*inputs)
        counts.append(explanation.graph_break_count)
        frames = [frame for each in explanation.break_reasons for frame in each.user_stack]
        places |= {frame.name for frame in frames if "effdet_fast" in frame.filename}
    assert counts[1] < counts[0]
    assert places == (set() if training else {"postprocess_detections"})


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_stay_accelerated_and_restore_undoes_it(copy_of, calls):
    plain = plain_model()
    model = accelerated(plain)
    other = copy_of(model)
    assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
    assert isinstance(other, RetinaNet) and list(other.state_dict()) == list(plain.state_dict())
    loss_of_outputs(other)
    assert calls == ["match_anchors", "detection_loss"]
    effdet_fast.restore(other)
    assert [type(module) for module in other.modules()] == [type(module) for module in plain.modules()]
    loss_of_outputs(other)
    assert len(calls) == 2


def test_the_report(name="retinanet_resnet18_fpn_v2"):
    report = effdet_fast.accelerate(plain_model(name))
    assert {(row.path, row.family) for row in report.swapped} == SWAPPED and not report.left_alone
    only = effdet_fast.accelerate(plain_model(name), only=["nms"])
    assert [(row.path, row.kind, row.family) for row in only.rows] == [("", "RetinaNet", "nms")]


class OwnClassLoss(RetinaNetClassificationHead):
    def compute_loss(self, targets, head_outputs, matched_idxs):
        return 2 * super().compute_loss(targets, head_outputs, matched_idxs)


class OwnBoxLoss(RetinaNetRegressionHead):
    def compute_loss(self, targets, head_outputs, anchors, matched_idxs):
        return 2 * super().compute_loss(targets, head_outputs, anchors, matched_idxs)


class OwnDetections(RetinaNet):
    def postprocess_detections(self, head_outputs, anchors, image_shapes):
        return super().postprocess_detections(head_outputs, anchors, image_shapes)[::-1]


class OwnAnchors(AnchorGenerator):
    def forward(self, image_list, feature_maps):
        return [anchors + image for image, anchors in enumerate(super().forward(image_list, feature_maps))]


class Renamed(RetinaNet):
    """Overrides nothing."""


def _set(path, value):
    def change(model):
        owner, _, name = path.rpartition(".")
        target = functools.reduce(getattr, owner.split("."), model) if owner else model
        setattr(target, name, value)

    return change


def _become(path, cls):
    return _set(f"{path}.__class__".lstrip("."), cls)


CHANGES = {
    "class loss": (_become("head.classification_head", OwnClassLoss), "OwnClassLoss.compute_loss is not torchvision's"),
    "box loss": (_become("head.regression_head", OwnBoxLoss), "OwnBoxLoss.compute_loss is not torchvision's"),
    "detections": (_become("", OwnDetections), "OwnDetections.postprocess_detections is not torchvision's"),
    "anchors": (_become("anchor_generator", OwnAnchors), "OwnAnchors.forward is not torchvision's"),
    "method": (_set("compute_loss", lambda *_: {}), "RetinaNet.compute_loss is not torchvision's"),
    "ciou": (_set("head.regression_head._loss_type", "ciou"), "box loss 'ciou'"),
    "weights": (_set("box_coder.weights", (10.0, 10.0, 5.0, 5.0)), "box coder weights (10.0, 10.0, 5.0, 5.0)"),
    "limit": (_set("head.regression_head.box_coder.bbox_xform_clip", 1.0), "box coder limit 1.0"),
    "no background": (_set("proposal_matcher.low_threshold", 0.0), "matcher's low_threshold 0.0"),
    "no limit": (_set("detections_per_img", -1), "no limit of detections"),
    "head": (_set("head", nn.Identity()), "Identity is no RetinaNetHead"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_torchvisions_is_left_alone_and_says_so(change):
    modify, reason = CHANGES[change]
    model = plain_model()
    modify(model)
    report = effdet_fast.accelerate(model)
    assert reason in {row.reason for row in report.left_alone}
    assert len(report.swapped) < len(SWAPPED)


@pytest.mark.parametrize("change", [name for name in CHANGES if name not in ("head", "method")])
def test_a_change_after_it_counts(change):
    modify, _ = CHANGES[change]
    plain = plain_model()
    model = accelerated(plain)
    for each in (plain, model):
        if change in ("class loss", "box loss", "detections", "anchors"):  # a class given later is its own
            effdet_fast.restore(each)
        modify(each)
    torch.testing.assert_close(loss_of_outputs(model)[0], loss_of_outputs(plain)[0], rtol=1e-5, atol=1e-7)
    found, expected = detections_of_outputs(model), detections_of_outputs(plain)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)


def test_a_subclass_that_overrides_nothing_is_swapped():
    model = plain_model()
    model.__class__ = Renamed
    assert len(effdet_fast.accelerate(model).swapped) == len(SWAPPED)
