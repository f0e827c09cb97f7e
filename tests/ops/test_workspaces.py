"""What the detecting ops allocate follows the boxes there are; of the rows asked for only the result has memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from effdet_fast import ops
from tests.checks import all_equal

ROWS = 200_000


class Allocated(TorchDispatchMode):
    """Bytes of all outputs of all operators, those that are views left out."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)}
        for x in tree_flatten(result)[0]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.total += x.untyped_storage().nbytes()
        return result


def problem(n, device):
    start = torch.rand(1, n, 2, device=device) * 100
    labels = torch.randint(0, 3, (1, n), device=device)
    return torch.cat([start, start + 1], -1), torch.rand(1, n, device=device), labels


def bytes_of(detections):
    return sum(x.numel() * x.element_size() for x in detections)


# 4 boxes are for the kernel that takes one image after the other, 1100 for the one that takes all classes at once.
@pytest.mark.parametrize("method,n", [("hard", 4), ("hard", 1100), ("linear", 4), ("gaussian", 4)])
def test_batched_nms_padded(backend, method, n):
    if backend.name == "reference" and n > 4:
        pytest.skip("its loop takes minutes")
    given = problem(n, backend.device)
    with Allocated() as allocated:
        found = ops.batched_nms_padded(*given, 0.5, max_detections=ROWS, method=method)
    few = ops.batched_nms_padded(*given, 0.5, max_detections=n, method=method)
    assert all_equal([x[:, :n] for x in found[:4]], few[:4])
    assert not found.boxes[:, n:].any() and (found.labels[:, n:] == -1).all() and (found.indices[:, n:] == -1).all()
    assert allocated.total < 1.1 * bytes_of(found) + (1 << 20)


def test_soft_nms(backend):
    boxes, scores, labels = (x[0] for x in problem(4, backend.device))
    with Allocated() as allocated:
        ops.soft_nms(boxes, scores, labels, max_detections=ROWS)
    assert allocated.total < 1 << 16


def test_decode_detections(backend):
    outputs = [torch.randn(1, 3, 2, 2, device=backend.device)], [torch.randn(1, 4, 2, 2, device=backend.device)]
    anchors = problem(4, backend.device)[0][0]
    options = {"num_classes": 3, "max_detections": ROWS}
    with Allocated() as allocated:
        found = ops.decode_detections(*outputs, anchors, **options)
    assert (found.indices[:, 12:] == -1).all() and (found.indices[:, :5] >= 0).all()
    # The indices twice: of the candidates, and of their anchors.
    assert allocated.total < 1.1 * (bytes_of(found) + 8 * ROWS) + (1 << 20)
