"""What the detection loss promises besides its numbers: graphs, strides, compilation, determinism, errors."""

from functools import partial

import pytest
import torch

from effdet_fast.ops import detection_loss, detection_loss_reference
from tests.checks import all_equal, assert_same_in_every_run
from tests.ops.accuracy import guarded
from tests.ops.detection_problem import CHANNELS_LAST, CONTIGUOUS, assert_right, evaluate, problem


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_second_backward_writes_nothing_it_handed_out(native_backend, dtype):
    outputs, labels, deltas, positives, _ = problem([(4, 4), (3, 5)], 2, 8, dtype, native_backend.device)
    outputs = [x.requires_grad_() for x in outputs]
    loss = detection_loss(outputs[:2], outputs[2:], labels, deltas, positives, num_classes=8)
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
    outputs, labels, deltas, positives, _ = problem([(3, 4)], 2, 5, torch.float32, torch.device("cpu"))
    from effdet_fast.ops.detection_loss import _loss_and_grads as raw

    wanted = []
    monkeypatch.setitem(detection_loss.__globals__, "_loss_and_grads", lambda *a: wanted.append(a[-1]) or raw(*a))
    plain = detection_loss(outputs[:1], outputs[1:], labels, deltas, positives, num_classes=5)
    leaves = [x.clone().requires_grad_() for x in outputs]
    with torch.no_grad():
        detection_loss(leaves[:1], leaves[1:], labels, deltas, positives, num_classes=5)
    trained = detection_loss(leaves[:1], leaves[1:], labels, deltas, positives, num_classes=5)
    assert wanted == [False, False, True] and not plain.total.requires_grad and trained.total.requires_grad
    torch.testing.assert_close(plain.total, trained.total.detach(), rtol=1e-6, atol=0)


def test_frozen_outputs_get_no_gradient(native_backend):
    outputs, labels, deltas, positives, _ = problem([(3, 4), (2, 2)], 2, 5, torch.float64, native_backend.device)
    outputs[0].requires_grad_()
    outputs[3].requires_grad_()
    loss = detection_loss(outputs[:2], outputs[2:], labels, deltas, positives, num_classes=5)
    loss.total.backward()
    _, expected = evaluate(detection_loss, outputs, labels, deltas, positives, None, num_classes=5)
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
    outputs, labels, deltas, positives, _ = problem(
        sizes, per_cell, classes, torch.float32, native_backend.device, layout
    )
    views = [strided(x, kind) for x in outputs]
    expected = detection_loss_reference(views[:2], views[2:], labels, deltas, positives, num_classes=classes)
    leaves = [x.detach().requires_grad_() for x in views]
    loss = detection_loss(leaves[:2], leaves[2:], guarded(labels), guarded(deltas), positives, num_classes=classes)
    torch.testing.assert_close(loss.total.detach(), expected.total, rtol=1e-5, atol=0)
    grads = torch.autograd.grad(loss.total, leaves)
    dense = [x.contiguous().requires_grad_() for x in views]
    reference = detection_loss_reference(dense[:2], dense[2:], labels, deltas, positives, num_classes=classes)
    for mine, other in zip(grads, torch.autograd.grad(reference.total, dense), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST], ids=str)
def test_gradients_have_the_layout_of_the_outputs(native_backend, layout):
    outputs, labels, deltas, positives, _ = problem(
        [(4, 3), (3, 2)], 2, 3, torch.float32, native_backend.device, layout
    )
    _, grads = evaluate(detection_loss, outputs, labels, deltas, positives, None, num_classes=3)
    assert [grad.stride() for grad in grads] == [x.stride() for x in outputs]


def test_layouts_may_differ_between_outputs(native_backend):
    given = problem([(4, 8), (3, 2)], 2, 4, torch.float64, native_backend.device)
    for i in (0, 3):
        given[0][i] = given[0][i].contiguous(memory_format=CHANNELS_LAST)
    assert_right(detection_loss, given, num_classes=4)


def test_ignored_anchors_have_no_class_loss_whatever_their_logits(native_backend):
    outputs, labels, deltas, positives, _ = problem([(4, 4)], 2, 3, torch.float32, native_backend.device)
    labels[:, 5] = -2
    expected = detection_loss(outputs[:1], outputs[1:], labels, deltas, positives, num_classes=3)
    for layout in (CONTIGUOUS, CHANNELS_LAST):
        cls = outputs[0].clone().contiguous(memory_format=layout)
        cls[:, 3:, 0, 2] = float("nan")  # anchor 1 of cell 2
        cls.requires_grad_()
        loss = detection_loss([cls], outputs[1:], labels, deltas, positives, num_classes=3)
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
        assert_same_in_every_run(partial(evaluate, detection_loss, *given, num_classes=20), repeats)


def test_label_types_and_one_normalizer_for_all(native_backend):
    outputs, labels, deltas, positives, _ = problem([(4, 3)], 2, 3, torch.float32, native_backend.device)
    expected = detection_loss(outputs[:1], outputs[1:], labels, deltas, positives, num_classes=3)
    for dtype in (torch.int32, torch.int16, torch.int8):
        for normalizer in (positives, positives.long(), positives.sum()):
            loss = detection_loss(
                outputs[:1], outputs[1:], labels.to(dtype), deltas.double(), normalizer, num_classes=3
            )
            assert all_equal(loss, expected)


@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST], ids=str)
@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck(device, layout, with_grad, weighted):
    outputs, labels, deltas, positives, anchors = problem([(2, 3), (1, 2)], 2, 4, torch.float32, device, layout)
    last = [layout == CHANNELS_LAST] * 4
    arguments = (
        outputs[:2],
        outputs[2:],
        labels,
        deltas,
        anchors,
        positives,
        torch.rand(4, device=device) if weighted else None,
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
    upstream = (torch.tensor(2.0, device=device), None, torch.tensor(0.5, device=device))
    torch.library.opcheck(raw.detection_loss_backward.default, (*upstream, *arguments))
    torch.library.opcheck(raw.detection_loss_rescale_.default, ([x.clone() for x in outputs], 50.0, *upstream))


@pytest.mark.compiles
@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST], ids=str)
def test_compiles_without_a_break(device, layout):
    given = problem([(4, 3), (2, 2)], 2, 5, torch.float32, device, layout)
    compiled = torch.compile(detection_loss, fullgraph=True)
    mine, grads = evaluate(compiled, *given, (3.0, 0.0, 1.0), num_classes=5)
    expected, expected_grads = evaluate(detection_loss, *given, (3.0, 0.0, 1.0), num_classes=5)
    torch.testing.assert_close(mine, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(list(grads), list(expected_grads), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_promotes_outputs_of_different_dtypes(backend, dtype):
    outputs, labels, deltas, positives, anchors = problem([(4, 3)], 2, 5, dtype, backend.device)
    with torch.autocast(backend.device.type, dtype):
        same, _ = evaluate(detection_loss, outputs, labels, deltas, positives, anchors, num_classes=5)
        mixed = [outputs[0], outputs[1].float()]
        loss, grads = evaluate(detection_loss, mixed, labels, deltas, positives, anchors, num_classes=5)
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
