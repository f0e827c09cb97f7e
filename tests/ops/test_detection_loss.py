"""The detection loss on every backend, against a float64 oracle and against effdet and torchvision."""

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import generalized_box_iou_loss

from effdet_fast.ops import detection_loss, detection_loss_reference
from tests.ops.accuracy import RTOL, guarded

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last
# Few cells of many, odd and single classes; 16 x 4 pixels and 2 x 8 classes are whole vectors, the rest are not.
SHAPES = [
    ([(16, 4), (3, 5), (1, 1)], 2, 8),
    ([(5, 7)], 3, 7),
    ([(2, 2), (1, 3)], 1, 1),
    ([(3, 3), (0, 4)], 2, 37),
]


def problem(sizes, per_cell, classes, dtype, device, layout=CONTIGUOUS, batch=3, positives=0.2):
    """Outputs (class levels, box levels), labels, codes, numbers of positives and anchors."""

    def outputs(values, spread, shift):
        shapes = [(batch, per_cell * values, height, width) for height, width in sizes]
        levels = [(torch.randn(s, dtype=torch.float64) * spread + shift).to(dtype).to(device) for s in shapes]
        return [x.contiguous(memory_format=layout) for x in levels]

    count = per_cell * sum(height * width for height, width in sizes)
    chance = torch.rand(batch, count)
    labels = torch.where(chance < positives, torch.randint(classes, (batch, count)), -1)
    labels[chance > 0.95] = -2
    codes = torch.where((labels >= 0).unsqueeze(2), torch.randn(batch, count, 4) * 0.4, 0.0)
    corners = torch.rand(count, 2) * 50
    anchors = torch.cat([corners, corners + 5 + 20 * torch.rand(count, 2)], 1)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    targets = [labels, codes.to(acc), (labels >= 0).sum(1).to(acc), anchors.to(acc)]
    return [*outputs(classes, 3.0, -1.0), *outputs(4, 0.5, 0.0)], *(x.to(device) for x in targets)


def evaluate(function, outputs, labels, codes, positives, anchors, upstream=(1.0, 0.0, 0.0), dtype=None, **options):
    """Losses and gradients of all outputs; `upstream` of the three losses."""
    leaves = [(x if dtype is None else x.to(dtype)).detach().requires_grad_() for x in outputs]
    levels = len(leaves) // 2
    loss = function(leaves[:levels], leaves[levels:], labels, codes, positives, anchors=anchors, **options)
    known = [(value, torch.full_like(value, factor)) for value, factor in zip(loss, upstream, strict=True) if factor]
    values, factors = zip(*known, strict=True)
    grads = torch.autograd.grad(values, leaves, factors, materialize_grads=True)
    return [value.detach() for value in loss], grads


def assert_right(function, given, upstream=(1.0, 0.0, 0.0), **options):
    """Losses and gradients within a few units in the last place of the terms of the float64 oracle; half precision within one
    rounding of the gradient more."""
    outputs, labels, codes, positives, anchors = given
    ours, grads = evaluate(function, outputs, labels, codes, positives, anchors, upstream, **options)
    wide = [x.double() for x in (codes, positives, anchors)]
    exact, exact_grads = evaluate(
        detection_loss_reference, outputs, labels, *wide, upstream, dtype=torch.float64, **options
    )
    dtype = outputs[0].dtype
    rtol = RTOL.get(dtype, RTOL[torch.float32])
    for mine, value in zip(ours, exact, strict=True):
        assert mine.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and mine.dim() == 0
        torch.testing.assert_close(mine.double(), value, rtol=4 * rtol, atol=0)
    eps = torch.finfo(dtype).eps / 2 if dtype not in RTOL else 0
    for x, mine, value in zip(outputs, grads, exact_grads, strict=True):
        assert mine.dtype == x.dtype and mine.shape == x.shape
        if x.numel():
            # The largest gradient is the scale of the terms that cancel; below `tiny` a half has no more digits.
            bound = 4 * rtol * value.abs().max() + eps * value.abs() + (torch.finfo(dtype).tiny * eps if eps else 0)
            assert ((mine.double() - value).abs() <= bound).all()


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


def test_targets_are_codes_whatever_the_box_loss(backend):
    """L1 and smooth L1 count a positive's code of exactly 0, Huber does not."""
    outputs, labels, codes, positives, anchors = problem([(3, 3)], 1, 2, torch.float64, backend.device)
    codes.zero_()
    losses = {
        kind: float(
            detection_loss(outputs[:1], outputs[1:], labels, codes, positives, num_classes=2, box_loss=kind).box
        )
        for kind in ("huber", "l1", "smooth_l1")
    }
    assert losses["huber"] == 0 and losses["l1"] > 0 and losses["smooth_l1"] > 0


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
    from effdet.loss import loss_fn

    sizes, per_cell, classes = [(6, 4), (3, 2)], 3, 11
    outputs, labels, codes, positives, anchors = problem(
        sizes, per_cell, classes, torch.float32, backend.device, layout
    )
    counts = [height * width * per_cell for height, width in sizes]
    shapes = [(3, height, width, per_cell) for height, width in sizes]
    cls_targets = [x.reshape(shape) for x, shape in zip(labels.split(counts, 1), shapes, strict=True)]
    box_targets = [x.reshape(*s[:3], 4 * s[3]) for x, s in zip(codes.split(counts, 1), shapes, strict=True)]
    options = dict(num_classes=classes, alpha=0.25, gamma=1.5, delta=0.1, box_loss_weight=50.0, label_smoothing=0.01)

    def theirs(cls, box, *_, anchors, **options):
        return loss_fn(cls, box, cls_targets, box_targets, positives, **options)

    def of_lists(cls, box, *_, anchors, **options):
        return detection_loss(cls, box, cls_targets, box_targets, positives, **options)

    expected, expected_grads = evaluate(theirs, outputs, labels, codes, positives, anchors, **options)
    for function in (detection_loss, of_lists):
        mine, grads = evaluate(function, outputs, labels, codes, positives, anchors, **options)
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(list(grads), list(expected_grads), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("box_loss", ["l1", "giou"])
def test_equals_torchvisions_retinanet(backend, box_loss):
    """Its head's compute_loss, from the matches that our labels and codes were made of."""
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
    codes = torch.stack([coder.encode_single(image, anchors) for image in matched])
    outputs[2:] = [5 * x for x in outputs[2:]]  # some beyond the limit of the decoder
    assert box_loss == "l1" or max(float(x.max()) for x in outputs[2:]) > 4.2

    head = RetinaNetHead(8, per_cell, classes)
    head.regression_head._loss_type = box_loss
    targets = [{"boxes": b, "labels": label} for b, label in zip(boxes, gt_labels, strict=True)]

    def theirs(cls, box, *_, anchors, **options):
        def joined(levels, values):
            views = [x.unflatten(1, (per_cell, values)).permute(0, 3, 4, 1, 2) for x in levels]
            return torch.cat([x.reshape(batch, -1, values) for x in views], 1)

        heads = {"cls_logits": joined(cls, classes), "bbox_regression": joined(box, 4)}
        losses = head.compute_loss(targets, heads, [anchors] * batch, list(matches))
        return losses["classification"] + losses["bbox_regression"], *losses.values()

    options = dict(num_classes=classes, gamma=2.0, box_loss_weight=1.0, normalizer="per_image", box_coder="torchvision")
    given = (outputs, labels, codes, positive.sum(1).double(), anchors)
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
    codes, targets = predicted.double().to(backend.device), wanted.double().to(backend.device)
    coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
    box = codes.t().reshape(1, 4, 1, 6).clone().requires_grad_()
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
    codes.requires_grad_()
    boxes = [coder.decode_single(x, anchors) for x in (codes, targets)]
    expected = generalized_box_iou_loss(*boxes, reduction="sum")
    torch.testing.assert_close(loss.box, expected)
    (mine,), (theirs,) = torch.autograd.grad(loss.box, box), torch.autograd.grad(expected, codes)
    torch.testing.assert_close(mine.reshape(4, 6).t(), theirs)


@pytest.mark.parametrize("box_loss", ["huber", "l1", "smooth_l1", "giou"])
@pytest.mark.parametrize("normalizer", ["batch", "per_image"])
def test_gradcheck(backend, box_loss, normalizer):
    outputs, labels, codes, positives, anchors = problem(
        [(2, 2), (1, 1)], 1, 3, torch.float64, backend.device, batch=2, positives=0.5
    )
    outputs = [x.requires_grad_() for x in outputs]
    options = dict(num_classes=3, box_loss=box_loss, normalizer=normalizer, anchors=anchors, delta=0.3)
    assert torch.autograd.gradcheck(
        lambda *x: detection_loss(x[:2], x[2:], labels, codes, positives, **options), outputs
    )


def test_second_derivative(native_backend):
    outputs, labels, codes, positives, anchors = problem(
        [(2, 1)], 1, 2, torch.float64, native_backend.device, batch=2, positives=0.6
    )
    outputs = [x.requires_grad_() for x in outputs]
    options = dict(num_classes=2, box_loss="giou", anchors=anchors)
    assert torch.autograd.gradgradcheck(
        lambda a, b: detection_loss([a], [b], labels, codes, positives, **options), outputs
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_second_backward_writes_nothing_it_handed_out(native_backend, dtype):
    outputs, labels, codes, positives, _ = problem([(4, 4), (3, 5)], 2, 8, dtype, native_backend.device)
    outputs = [x.requires_grad_() for x in outputs]
    loss = detection_loss(outputs[:2], outputs[2:], labels, codes, positives, num_classes=8)
    scale = torch.tensor(4.0, device=native_backend.device)
    first = torch.autograd.grad(loss.total, outputs, scale, retain_graph=True)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(loss.total, outputs, scale, retain_graph=True)
    third = torch.autograd.grad(loss.total, outputs, 2 * scale)
    for a, b, c, before in zip(first, second, third, kept, strict=True):
        assert torch.equal(a, before) and torch.equal(a, b) and a.data_ptr() != b.data_ptr()
        torch.testing.assert_close(c, 2 * a, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny)


def test_float16_keeps_gradients_that_a_loss_scale_brings_into_range(native_backend):
    """Confident negatives of a batch with many positives: below float16's smallest number until scaled."""
    cls = torch.full((1, 4, 2, 2), -5.0, dtype=torch.float16, device=native_backend.device, requires_grad=True)
    box = torch.zeros(1, 4, 2, 2, dtype=torch.float16, device=native_backend.device)
    labels = torch.full((1, 4), -1, device=native_backend.device)
    zeros, positives = (
        torch.zeros(1, 4, 4, device=native_backend.device),
        torch.full((1,), 999.0, device=native_backend.device),
    )
    loss = detection_loss([cls], [box], labels, zeros, positives, num_classes=4)
    (scaled,) = torch.autograd.grad(loss.total * 65536, cls)
    wide = cls.detach().double().requires_grad_()
    reference = detection_loss_reference(
        [wide], [box.double()], labels, zeros.double(), positives.double(), num_classes=4
    )
    (exact,) = torch.autograd.grad(reference.total * 65536, wide)
    assert ((exact / 65536).half() == 0).all()
    torch.testing.assert_close(scaled.double(), exact, rtol=1e-3, atol=0)


def test_no_gradient_is_written_unless_wanted(monkeypatch):
    outputs, labels, codes, positives, _ = problem([(3, 4)], 2, 5, torch.float32, torch.device("cpu"))
    from effdet_fast.ops.detection_loss import _loss_and_grads as raw

    wanted = []
    monkeypatch.setitem(detection_loss.__globals__, "_loss_and_grads", lambda *a: wanted.append(a[-1]) or raw(*a))
    plain = detection_loss(outputs[:1], outputs[1:], labels, codes, positives, num_classes=5)
    leaves = [x.clone().requires_grad_() for x in outputs]
    with torch.no_grad():
        detection_loss(leaves[:1], leaves[1:], labels, codes, positives, num_classes=5)
    trained = detection_loss(leaves[:1], leaves[1:], labels, codes, positives, num_classes=5)
    assert wanted == [False, False, True] and not plain.total.requires_grad and trained.total.requires_grad
    torch.testing.assert_close(plain.total, trained.total.detach(), rtol=1e-6, atol=0)


def test_frozen_outputs_get_no_gradient(native_backend):
    outputs, labels, codes, positives, _ = problem([(3, 4), (2, 2)], 2, 5, torch.float64, native_backend.device)
    outputs[0].requires_grad_()
    outputs[3].requires_grad_()
    loss = detection_loss(outputs[:2], outputs[2:], labels, codes, positives, num_classes=5)
    loss.total.backward()
    _, expected = evaluate(detection_loss, outputs, labels, codes, positives, None, num_classes=5)
    assert torch.equal(outputs[0].grad, expected[0]) and torch.equal(outputs[3].grad, expected[3])
    assert outputs[1].grad is None and outputs[2].grad is None


def strided(x, kind):
    """The same values with other strides."""
    if kind == "misaligned":
        return guarded(x)
    if kind == "batch slice":
        return torch.stack([x, torch.full_like(x, float("nan"))], 1)[:, 0]
    if kind == "channel slice":
        return torch.cat([x, torch.full_like(x, float("nan"))], 1)[:, : x.shape[1]]
    if kind == "channel slice, channels last":
        return torch.cat([x, torch.full_like(x, float("nan"))], 1).contiguous(memory_format=CHANNELS_LAST)[
            :, : x.shape[1]
        ]
    if kind == "pixel slice":
        return torch.stack([x, torch.full_like(x, float("nan"))], -1)[..., 0]
    if kind == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    return x[:1].expand_as(x)


KINDS = [
    "misaligned",
    "batch slice",
    "channel slice",
    "channel slice, channels last",
    "pixel slice",
    "transposed",
    "expanded",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST], ids=str)
def test_strides(native_backend, kind, layout):
    sizes, per_cell, classes = [(4, 8), (3, 2)], 2, 8
    outputs, labels, codes, positives, _ = problem(
        sizes, per_cell, classes, torch.float32, native_backend.device, layout
    )
    views = [strided(x, kind) for x in outputs]
    expected = detection_loss_reference(views[:2], views[2:], labels, codes, positives, num_classes=classes)
    leaves = [x.detach().requires_grad_() for x in views]
    loss = detection_loss(leaves[:2], leaves[2:], guarded(labels), guarded(codes), positives, num_classes=classes)
    torch.testing.assert_close(loss.total.detach(), expected.total, rtol=1e-5, atol=0)
    grads = torch.autograd.grad(loss.total, leaves)
    dense = [x.contiguous().requires_grad_() for x in views]
    reference = detection_loss_reference(dense[:2], dense[2:], labels, codes, positives, num_classes=classes)
    for mine, other in zip(grads, torch.autograd.grad(reference.total, dense), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST], ids=str)
def test_gradients_have_the_layout_of_the_outputs(native_backend, layout):
    outputs, labels, codes, positives, _ = problem([(4, 3), (3, 2)], 2, 3, torch.float32, native_backend.device, layout)
    _, grads = evaluate(detection_loss, outputs, labels, codes, positives, None, num_classes=3)
    assert [grad.stride() for grad in grads] == [x.stride() for x in outputs]


def test_layouts_may_differ_between_outputs(native_backend):
    given = problem([(4, 8), (3, 2)], 2, 4, torch.float64, native_backend.device)
    for i in (0, 3):
        given[0][i] = given[0][i].contiguous(memory_format=CHANNELS_LAST)
    assert_right(detection_loss, given, num_classes=4)


def test_ignored_anchors_have_no_class_loss_whatever_their_logits(native_backend):
    outputs, labels, codes, positives, _ = problem([(4, 4)], 2, 3, torch.float32, native_backend.device)
    labels[:, 5] = -2
    expected = detection_loss(outputs[:1], outputs[1:], labels, codes, positives, num_classes=3)
    for layout in (CONTIGUOUS, CHANNELS_LAST):
        cls = outputs[0].clone().contiguous(memory_format=layout)
        cls[:, 3:, 0, 2] = float("nan")  # anchor 1 of cell 2
        cls.requires_grad_()
        loss = detection_loss([cls], outputs[1:], labels, codes, positives, num_classes=3)
        torch.testing.assert_close(loss.cls.detach(), expected.cls)
        (grad,) = torch.autograd.grad(loss.cls, cls)
        assert not grad[:, 3:, 0, 2].any() and grad.isfinite().all()


@pytest.mark.parametrize("batch,sizes", [(0, [(2, 2)]), (2, [(0, 3)])], ids=str)
@pytest.mark.parametrize("normalizer", ["batch", "per_image"])
def test_empty(backend, batch, sizes, normalizer):
    given = problem(sizes, 2, 3, torch.float32, backend.device, batch=batch)
    losses, grads = evaluate(detection_loss, *given, num_classes=3, normalizer=normalizer)
    assert losses == [0, 0, 0] and [g.shape for g in grads] == [x.shape for x in given[0]]


def test_same_bits_every_time(native_backend):
    repeats = 3 if native_backend.name == "emulated" else 20
    sizes = [(8, 8), (3, 3)] if native_backend.name == "emulated" else [(64, 64), (32, 32), (7, 5)]
    for layout in (CONTIGUOUS, CHANNELS_LAST):
        given = problem(sizes, 3, 20, torch.float32, native_backend.device, layout)
        results = []
        threads = torch.get_num_threads()
        try:
            for i in range(repeats):
                torch.set_num_threads(1 + i % 2)
                losses, grads = evaluate(detection_loss, *given, num_classes=20)
                results.append([*losses, *grads])
        finally:
            torch.set_num_threads(threads)
        assert all(all(map(torch.equal, results[0], other)) for other in results)


def test_label_types_and_one_normaliser_for_all(native_backend):
    outputs, labels, codes, positives, _ = problem([(4, 3)], 2, 3, torch.float32, native_backend.device)
    expected = detection_loss(outputs[:1], outputs[1:], labels, codes, positives, num_classes=3)
    for dtype in (torch.int32, torch.int16, torch.int8):
        for normaliser in (positives, positives.long(), positives.sum()):
            loss = detection_loss(outputs[:1], outputs[1:], labels.to(dtype), codes.double(), normaliser, num_classes=3)
            assert all(map(torch.equal, loss, expected))


@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST], ids=str)
@pytest.mark.parametrize("with_grad", [False, True])
def test_opcheck(layout, with_grad):
    outputs, labels, codes, positives, anchors = problem(
        [(2, 3), (1, 2)], 2, 4, torch.float32, torch.device("cpu"), layout
    )
    last = [layout == CHANNELS_LAST] * 4
    arguments = (
        outputs[:2],
        outputs[2:],
        labels,
        codes,
        anchors,
        positives,
        4,
        0.25,
        1.5,
        0.1,
        3,
        1,
        0.1,
        50.0,
        1,
        last,
    )
    raw = torch.ops.effdet_fast
    torch.library.opcheck(raw.detection_loss.default, (*arguments, with_grad))
    upstream = (torch.tensor(2.0), None, torch.tensor(0.5))
    torch.library.opcheck(raw.detection_loss_backward.default, (*upstream, *arguments))
    torch.library.opcheck(raw.detection_loss_rescale_.default, ([x.clone() for x in outputs], 50.0, *upstream))


@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST], ids=str)
def test_compiles_without_a_break(layout):
    given = problem([(4, 3), (2, 2)], 2, 5, torch.float32, torch.device("cpu"), layout)
    compiled = torch.compile(detection_loss, fullgraph=True)
    mine, grads = evaluate(compiled, *given, (3.0, 0.0, 1.0), num_classes=5)
    expected, expected_grads = evaluate(detection_loss, *given, (3.0, 0.0, 1.0), num_classes=5)
    torch.testing.assert_close(mine, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(list(grads), list(expected_grads), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_promotes_outputs_of_different_dtypes(backend, dtype):
    outputs, labels, codes, positives, anchors = problem([(4, 3)], 2, 5, dtype, backend.device)
    with torch.autocast(backend.device.type, dtype):
        same, _ = evaluate(detection_loss, outputs, labels, codes, positives, anchors, num_classes=5)
        mixed = [outputs[0], outputs[1].float()]
        loss, grads = evaluate(detection_loss, mixed, labels, codes, positives, anchors, num_classes=5)
    assert grads[0].dtype == dtype and grads[1].dtype == torch.float32
    torch.testing.assert_close(loss, same, rtol=1e-5, atol=0)


X, B = torch.zeros(2, 6, 3, 4), torch.zeros(2, 8, 3, 4)
ERRORS = [
    (dict(cls_outputs=X), TypeError, "cls_outputs must be a list or tuple of tensors, got Tensor"),
    (dict(cls_outputs=[]), ValueError, "cls_outputs must be 1 to 8 levels, got 0"),
    (dict(cls_outputs=[X] * 9, box_outputs=[B] * 9), ValueError, "cls_outputs must be 1 to 8 levels, got 9"),
    (dict(box_outputs=[B, B]), ValueError, "box_outputs must be 1 levels as cls_outputs, got 2"),
    (dict(num_classes=0), ValueError, "num_classes must be at least 1, got 0"),
    (dict(num_classes=4), ValueError, r"cls_outputs\[0\] must have shape \[B, A \* 4, H, W\], got \[2, 6, 3, 4\]"),
    (dict(cls_outputs=[X.long()]), TypeError, r"cls_outputs\[0\] must be float16, .* got int64"),
    (
        dict(cls_outputs=[X, X[:1]], box_outputs=[B, B]),
        ValueError,
        r"cls_outputs\[1\] must have shape \[2, 6, H, W\], got \[1, 6, 3, 4\]",
    ),
    (dict(box_outputs=[X]), ValueError, r"box_outputs\[0\] must have shape \[2, 8, 3, 4\], got \[2, 6, 3, 4\]"),
    (
        dict(box_outputs=[B.double()]),
        TypeError,
        "cls_outputs and box_outputs must have one dtype outside autocast, got float32, float64",
    ),
    (
        dict(box_outputs=[B.to("meta")]),
        ValueError,
        r"box_outputs\[0\] must be on the device of cls_outputs\[0\], cpu, got meta",
    ),
    (dict(cls_targets=torch.zeros(2, 23).long()), ValueError, r"cls_targets must have shape \[2, 24\], got \[2, 23\]"),
    (
        dict(cls_targets=[torch.zeros(2, 24).long()]),
        ValueError,
        r"cls_targets must have shapes \[\[2, 3, 4, 2\]\], got \[\[2, 24\]\]",
    ),
    (dict(cls_targets=torch.zeros(2, 24)), TypeError, "cls_targets must be integer, got float32"),
    (dict(cls_targets=torch.full((2, 24), 3)), ValueError, r"labels must be a class in \[0, 3\), .* got 3"),
    (dict(box_targets=torch.zeros(2, 24, 4).long()), TypeError, "box_targets must be float16, .* got int64"),
    (
        dict(box_targets=torch.zeros(2, 24, 4, requires_grad=True)),
        ValueError,
        "box_targets must not require a gradient",
    ),
    (dict(num_positives=3.0), TypeError, "num_positives must be a Tensor, got float"),
    (dict(num_positives=torch.zeros(3)), ValueError, r"num_positives must have shape \[2\], got \[3\]"),
    (
        dict(num_positives=torch.tensor(3.0), normalizer="per_image"),
        ValueError,
        r"num_positives must have shape \[2\], got \[\]",
    ),
    (dict(alpha=2.0), ValueError, r"alpha must be in \[0, 1\], or -1 for no weighting, got 2.0"),
    (dict(delta=0.0), ValueError, "delta must be positive, got 0.0"),
    (dict(box_loss_weight=-1), ValueError, "box_loss_weight must be >= 0, got -1"),
    (dict(box_loss="diou"), ValueError, "box_loss must be one of 'huber', 'l1', 'smooth_l1', 'giou', got 'diou'"),
    (dict(normalizer="none"), ValueError, "normalizer must be one of 'batch', 'per_image', got 'none'"),
    (dict(box_coder="yolo"), ValueError, "box_coder must be one of 'effdet', 'torchvision', got 'yolo'"),
    (dict(box_loss="giou"), ValueError, "anchors must be given with box_loss='giou', got None"),
    (dict(anchors=torch.zeros(23, 4)), ValueError, r"anchors must have shape \[24, 4\], got \[23, 4\]"),
]


@pytest.mark.parametrize("change,error,message", ERRORS, ids=[m[:40] for _, _, m in ERRORS])
def test_bad_input(change, error, message):
    arguments = dict(
        cls_outputs=[X],
        box_outputs=[B],
        cls_targets=torch.zeros(2, 24, dtype=torch.int64),
        box_targets=torch.zeros(2, 24, 4),
        num_positives=torch.zeros(2),
        num_classes=3,
    )
    with pytest.raises(error, match=f"detection_loss: {message}"):
        detection_loss(**(arguments | change))
