"""Random outputs of a detector's heads, and how the candidates that the raw op finds in them compare with a stable sort."""

import torch

from effdet_fast._choices import BOX_CODERS
from effdet_fast.ops.decode_detections import decode_candidates_reference

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


def large_heads(batch, layout, device, ties):
    cls_outputs, box_outputs, anchors = heads(batch, 30, 9, [(40, 37), (20, 19)], layout=layout, device=device)
    if not ties:
        cls_outputs = [torch.randn_like(x) for x in cls_outputs]
    return cls_outputs, box_outputs, anchors
