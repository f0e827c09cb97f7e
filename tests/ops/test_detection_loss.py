"""The detection loss on every backend, against a float64 oracle and against effdet and torchvision."""

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import generalized_box_iou_loss

from effdet_fast.ops import detection_loss
from tests.checks import DTYPES
from tests.ops.detection_problem import CHANNELS_LAST, CONTIGUOUS, assert_right, evaluate, problem

# Few cells of many, odd and single classes; 16 x 4 pixels and 2 x 8 classes are whole vectors, the rest are not.
SHAPES = [
    ([(16, 4), (3, 5), (1, 1)], 2, 8),
    ([(5, 7)], 3, 7),
    ([(2, 2), (1, 3)], 1, 1),
    ([(3, 3), (0, 4)], 2, 37),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST], ids=str)
@pytest.mark.parametrize("sizes,per_cell,classes", SHAPES, ids=str)
def test_effdets_form_against_float64(backend, dtype, layout, sizes, per_cell, classes):
    given = problem(sizes, per_cell, classes, dtype, backend.device, layout)
    assert_right(detection_loss, given, num_classes=classes)


@pytest.mark.parametrize(
    "gamma,alpha,label_smoothing", [(2.0, 0.25, 0.0), (0.7, -1, 0.1), (0.0, 0.6, 0.3), (1.5, 0.25, 0.1)]
)
@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST], ids=str)
def test_focal_options_against_float64(backend, gamma, alpha, label_smoothing, layout):
    given = problem([(4, 4), (3, 1)], 2, 5, torch.float64, backend.device, layout)
    focal = dict(alpha=alpha, gamma=gamma, label_smoothing=label_smoothing)
    assert_right(detection_loss, given, num_classes=5, **focal)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST], ids=str)
@pytest.mark.parametrize("box_coder", ["effdet", "torchvision"])
@pytest.mark.parametrize("box_loss", ["huber", "l1", "smooth_l1", "giou"])
def test_box_losses_per_image_against_float64(backend, dtype, layout, box_coder, box_loss):
    given = problem([(4, 8), (3, 3)], 2, 3, dtype, backend.device, layout)
    given[2][1, :], given[1][1, :], given[3][1] = 0, -1, 0  # an image without positives
    options = dict(box_loss=box_loss, normalizer="per_image", box_coder=box_coder, delta=0.3, box_loss_weight=2.0)
    assert_right(detection_loss, given, num_classes=3, **options)


def test_targets_are_deltas_whatever_the_box_loss(backend):
    """L1 and smooth L1 count a positive's delta of exactly 0, Huber does not."""
    outputs, labels, deltas, positives, anchors = problem([(3, 3)], 1, 2, torch.float64, backend.device)
    deltas.zero_()
    losses = {
        kind: float(
            detection_loss(outputs[:1], outputs[1:], labels, deltas, positives, num_classes=2, box_loss=kind).box
        )
        for kind in ("huber", "l1", "smooth_l1")
    }
    assert losses["huber"] == 0 and losses["l1"] > 0 and losses["smooth_l1"] > 0


@pytest.mark.parametrize("label", ["first", "last", -2])
@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [3, 8, 9, 20])
def test_one_anchor_that_is_not_background(backend, dtype, layout, label, classes):
    """Vectors of background only take a way of their own; here each of 32 neighbors in turn is the one they must not miss."""
    given = problem([(4, 8)], 2, classes, dtype, backend.device, layout, batch=32, positives=0.0)
    outputs, labels, deltas, positives, anchors = given
    labels.fill_(-1)
    each = torch.arange(32, device=labels.device)
    labels[each, 2 * each + each % 2] = {"first": 0, "last": classes - 1}.get(label, label)
    assert_right(detection_loss, given, num_classes=classes)
    assert_right(detection_loss, (outputs, labels.int(), deltas, positives, anchors), num_classes=classes)


def test_a_nan_logit_that_counts_makes_its_own_gradient_nan(native_backend):
    for layout in (CONTIGUOUS, CHANNELS_LAST):
        given = problem([(4, 8)], 2, 8, torch.float32, native_backend.device, layout, batch=2)
        outputs, labels = given[0], given[1]
        outputs[0][0, 3, 1, 2] = outputs[0][1, 3, 1, 2] = float("nan")
        labels[0, :], labels[1, :] = -1, -2
        loss, grads = evaluate(detection_loss, *given, num_classes=8)
        expected = torch.zeros_like(grads[0], dtype=torch.bool)
        expected[0, 3, 1, 2] = True
        assert loss[1].isnan() and torch.equal(grads[0].isnan(), expected)


@pytest.mark.parametrize("upstream", [(1.0, 0, 0), (8.0, 0, 0), (0, 1.0, 50.0), (0, 3.0, 0), (2.0, 0.5, 0.25)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_upstream_gradients_of_every_result(native_backend, upstream, dtype):
    given = problem([(4, 4), (3, 5)], 2, 8, dtype, native_backend.device, CHANNELS_LAST)
    if dtype == torch.bfloat16 and upstream not in ((1.0, 0, 0), (8.0, 0, 0), (0, 1.0, 50.0)):
        pytest.skip("a factor that is no power of two rounds twice")
    assert_right(detection_loss, given, upstream, num_classes=8)


def test_a_box_gradient_where_boxes_have_no_weight(native_backend):
    given = problem([(3, 5)], 2, 3, torch.float64, native_backend.device)
    assert_right(detection_loss, given, (1.0, 0, 1.0), num_classes=3, box_loss_weight=0.0)


@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST], ids=str)
def test_equals_effdet(backend, layout):
    loss_fn = pytest.importorskip("effdet.loss").loss_fn
    sizes, per_cell, classes = [(6, 4), (3, 2)], 3, 11
    outputs, labels, deltas, positives, anchors = problem(
        sizes, per_cell, classes, torch.float32, backend.device, layout
    )
    counts = [height * width * per_cell for height, width in sizes]
    shapes = [(3, height, width, per_cell) for height, width in sizes]
    cls_targets = [x.reshape(shape) for x, shape in zip(labels.split(counts, 1), shapes, strict=True)]
    box_targets = [x.reshape(*s[:3], 4 * s[3]) for x, s in zip(deltas.split(counts, 1), shapes, strict=True)]
    options = dict(num_classes=classes, alpha=0.25, gamma=1.5, delta=0.1, box_loss_weight=50.0, label_smoothing=0.01)

    def theirs(cls, box, *_, anchors, **options):
        return loss_fn(cls, box, cls_targets, box_targets, positives, **options)

    def of_lists(cls, box, *_, anchors, **options):
        return detection_loss(cls, box, cls_targets, box_targets, positives, **options)

    expected, expected_grads = evaluate(theirs, outputs, labels, deltas, positives, anchors, **options)
    for function in (detection_loss, of_lists):
        mine, grads = evaluate(function, outputs, labels, deltas, positives, anchors, **options)
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(list(grads), list(expected_grads), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("box_loss", ["l1", "giou"])
def test_equals_torchvisions_retinanet(backend, box_loss):
    """Its head's compute_loss, from the matches that our labels and deltas were made of."""
    sizes, per_cell, classes, batch = [(4, 5), (2, 2)], 3, 6, 2
    outputs, *_, anchors = problem(sizes, per_cell, classes, torch.float64, backend.device, batch=batch)
    corners = torch.rand(batch, 4, 2, dtype=torch.float64) * 40
    boxes = torch.cat([corners, corners + 4 + 30 * torch.rand_like(corners)], 2).to(backend.device)
    gt_labels = torch.randint(classes, (batch, 4), device=backend.device)
    matches = torch.randint(
        -2, 4, (batch, len(anchors)), device=backend.device
    )  # -1 background, -2 between the thresholds
    matches[:, ::3] = -1
    positive = matches >= 0
    index = matches.clamp(min=0)
    labels = torch.where(positive, gt_labels.gather(1, index), matches)
    matched = boxes.gather(1, index.unsqueeze(2).expand(-1, -1, 4))
    coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
    deltas = torch.stack([coder.encode_single(image, anchors) for image in matched])
    outputs[2:] = [5 * x for x in outputs[2:]]  # some beyond the limit of the decoder
    assert box_loss == "l1" or max(float(x.max()) for x in outputs[2:]) > 4.2

    head = RetinaNetHead(8, per_cell, classes)
    head.regression_head._loss_type = box_loss
    targets = [{"boxes": b, "labels": label} for b, label in zip(boxes, gt_labels, strict=True)]

    def theirs(cls, box, *_, anchors, **options):
        def concat(levels, values):
            views = [x.unflatten(1, (per_cell, values)).permute(0, 3, 4, 1, 2) for x in levels]
            return torch.cat([x.reshape(batch, -1, values) for x in views], 1)

        heads = {"cls_logits": concat(cls, classes), "bbox_regression": concat(box, 4)}
        losses = head.compute_loss(targets, heads, [anchors] * batch, list(matches))
        return losses["classification"] + losses["bbox_regression"], *losses.values()

    options = dict(num_classes=classes, gamma=2.0, box_loss_weight=1.0, normalizer="per_image", box_coder="torchvision")
    given = (outputs, labels, deltas, positive.sum(1).double(), anchors)
    mine, grads = evaluate(detection_loss, *given, box_loss=box_loss, **options)
    expected, expected_grads = evaluate(theirs, *given)
    torch.testing.assert_close(mine, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(list(grads), list(expected_grads), rtol=1e-8, atol=1e-12)


def test_giou_is_torchvisions(backend):
    """Also where boxes lie inside one another or apart, and where corners are equal."""
    anchors = torch.tensor([[0.0, 0.0, 10.0, 20.0]], dtype=torch.float64, device=backend.device).repeat(6, 1)
    predicted = torch.tensor(
        [[0, 0, 0, 0], [0.1, -0.2, 0.3, 0.1], [0, 0, -1, -1], [3, 3, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]
    )
    wanted = torch.tensor([[0, 0, 0, 0], [0, 0.1, 0.0, 0.2], [0, 0, 0.5, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    deltas, targets = predicted.double().to(backend.device), wanted.double().to(backend.device)
    coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
    box = deltas.t().reshape(1, 4, 1, 6).clone().requires_grad_()
    loss = detection_loss(
        [torch.zeros(1, 2, 1, 6, dtype=torch.float64, device=backend.device)],
        [box],
        torch.zeros(1, 6, dtype=torch.int64, device=backend.device),
        targets.unsqueeze(0),
        torch.ones(1, dtype=torch.float64, device=backend.device),
        num_classes=2,
        box_loss="giou",
        normalizer="per_image",
        anchors=anchors,
        box_coder="torchvision",
    )
    deltas.requires_grad_()
    boxes = [coder.decode_single(x, anchors) for x in (deltas, targets)]
    expected = generalized_box_iou_loss(*boxes, reduction="sum")
    torch.testing.assert_close(loss.box, expected)
    (mine,), (theirs,) = torch.autograd.grad(loss.box, box), torch.autograd.grad(expected, deltas)
    torch.testing.assert_close(mine.reshape(4, 6).t(), theirs)


@pytest.mark.parametrize("box_loss", ["huber", "l1", "smooth_l1", "giou"])
@pytest.mark.parametrize("normalizer", ["batch", "per_image"])
def test_gradcheck(backend, box_loss, normalizer):
    outputs, labels, deltas, positives, anchors = problem(
        [(2, 2), (1, 1)], 1, 3, torch.float64, backend.device, batch=2, positives=0.5
    )
    outputs = [x.requires_grad_() for x in outputs]
    options = dict(num_classes=3, box_loss=box_loss, normalizer=normalizer, anchors=anchors, delta=0.3)
    assert torch.autograd.gradcheck(
        lambda *x: detection_loss(x[:2], x[2:], labels, deltas, positives, **options), outputs
    )


def test_second_derivative(native_backend):
    outputs, labels, deltas, positives, anchors = problem(
        [(2, 1)], 1, 2, torch.float64, native_backend.device, batch=2, positives=0.6
    )
    outputs = [x.requires_grad_() for x in outputs]
    options = dict(num_classes=2, box_loss="giou", anchors=anchors)
    assert torch.autograd.gradgradcheck(
        lambda a, b: detection_loss([a], [b], labels, deltas, positives, **options), outputs
    )
