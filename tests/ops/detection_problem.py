"""Random problems for the detection loss, and how a function does on them."""

import torch

from effdet_fast.ops import detection_loss_reference
from tests.ops.accuracy import RTOL

CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last


def problem(sizes, per_cell, classes, dtype, device, layout=CONTIGUOUS, batch=3, positives=0.2):
    """Outputs (class levels, box levels), labels, deltas, numbers of positives and anchors."""

    def outputs(values, spread, shift):
        shapes = [(batch, per_cell * values, height, width) for height, width in sizes]
        levels = [(torch.randn(s, dtype=torch.float64) * spread + shift).to(dtype).to(device) for s in shapes]
        return [x.contiguous(memory_format=layout) for x in levels]

    count = per_cell * sum(height * width for height, width in sizes)
    chance = torch.rand(batch, count)
    labels = torch.where(chance < positives, torch.randint(classes, (batch, count)), -1)
    labels[chance > 0.95] = -2
    deltas = torch.where((labels >= 0).unsqueeze(2), torch.randn(batch, count, 4) * 0.4, 0.0)
    corners = torch.rand(count, 2) * 50
    anchors = torch.cat([corners, corners + 5 + 20 * torch.rand(count, 2)], 1)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    targets = [labels, deltas.to(acc), (labels >= 0).sum(1).to(acc), anchors.to(acc)]
    return [*outputs(classes, 3.0, -1.0), *outputs(4, 0.5, 0.0)], *(x.to(device) for x in targets)


def evaluate(function, outputs, labels, deltas, positives, anchors, upstream=(1.0, 0.0, 0.0), dtype=None, **options):
    """Losses and gradients of all outputs; `upstream` of the three losses."""
    leaves = [(x if dtype is None else x.to(dtype)).detach().requires_grad_() for x in outputs]
    levels = len(leaves) // 2
    loss = function(leaves[:levels], leaves[levels:], labels, deltas, positives, anchors=anchors, **options)
    known = [(value, torch.full_like(value, factor)) for value, factor in zip(loss, upstream, strict=True) if factor]
    values, factors = zip(*known, strict=True)
    grads = torch.autograd.grad(values, leaves, factors, materialize_grads=True)
    return [value.detach() for value in loss], grads


def assert_right(function, given, upstream=(1.0, 0.0, 0.0), **options):
    """Losses and gradients within a few units in the last place of the terms of the float64 oracle; half precision within one
    rounding of the gradient more."""
    outputs, labels, deltas, positives, anchors = given
    ours, grads = evaluate(function, outputs, labels, deltas, positives, anchors, upstream, **options)
    wide = [x.double() for x in (deltas, positives, anchors)]
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
