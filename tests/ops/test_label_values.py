"""Labels that are no class: refused by public functions and raw ops alike, wherever that costs no synchronization."""

import pytest
import torch

from effdet_fast import ops
from tests.conftest import enter

CLASSES = 3


@pytest.fixture(params=["reference", "cpu", "emulated"])
def backend_on_cpu(request):
    yield from enter(request.param)


def focal_loss(labels):
    return ops.sigmoid_focal_loss(torch.zeros(*labels.shape, CLASSES, requires_grad=True), labels)


def detection_loss(labels):
    outputs = [torch.zeros(2, 2 * CLASSES, 2, 1, requires_grad=True)], [torch.zeros(2, 8, 2, 1)]
    return ops.detection_loss(*outputs, labels, torch.zeros(2, 4, 4), torch.ones(2), num_classes=CLASSES)


def labels_with(label, dtype=torch.int64):
    labels = torch.tensor([[0, -1, 2, -2], [1, 0, 2, -1]], dtype=dtype)
    labels[1, 2] = label
    return labels


@pytest.mark.parametrize("loss", [focal_loss, detection_loss])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8], ids=str)
@pytest.mark.parametrize("label", [CLASSES, -3, 127])
def test_a_label_that_is_none_is_named(backend_on_cpu, loss, dtype, label):
    message = rf"labels must be a class in \[0, {CLASSES}\), -1 \(background\) or -2 \(ignored\), got {label}"
    with pytest.raises(ValueError, match=message):
        loss(labels_with(label, dtype))
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        loss(labels_with(label, dtype))


@pytest.mark.parametrize("name", ["focal_loss", "focal_loss_sum", "focal_loss_backward"])
@pytest.mark.parametrize("label", [CLASSES, -3, 2**63 - 1, -(2**63)])
def test_raw_focal_loss_looks_at_labels(backend_on_cpu, name, label):
    logits = torch.zeros(2, 4, CLASSES)
    arguments = (logits, labels_with(0), 0.25, 2.0, 0.0)
    given = (logits, *arguments) if name.endswith("backward") else arguments
    op = getattr(torch.ops.effdet_fast, name)
    op(*given)
    given[-4][1, 2] = label
    with pytest.raises(RuntimeError, match=rf"focal_loss: labels must be a class in \[0, {CLASSES}\), .* got {label}"):
        op(*given)


@pytest.mark.compiles
@pytest.mark.parametrize("loss", [focal_loss, detection_loss])
def test_compiled_code_refuses_them(loss):
    compiled = torch.compile(loss, backend="aot_eager")
    compiled(labels_with(0))
    with pytest.raises(RuntimeError, match="labels must be a class"):
        compiled(labels_with(CLASSES))
