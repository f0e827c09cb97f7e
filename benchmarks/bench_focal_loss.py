"""Focal loss over all anchors of EfficientDet-D0 at 512: 49104 anchors x 90 classes an image, summed."""

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.workload import (
    BACKWARD,
    BOTH,
    CHANNELS_LAST,
    CONTIGUOUS,
    FORWARD,
    OURS,
    Case,
    Implementation,
    Workload,
    compiled,
    optional,
    oracle_copy,
)
from effdet_fast import ops

OP = "focal_loss"
ANCHORS, CLASSES = 49104, 90
ALPHA = 0.25


def cases(device_type: str) -> list[Case]:
    on_gpu = device_type == "cuda"
    batch = 16 if on_gpu else 2
    return [
        Case(f"labels, {batch} x 49104 anchors x 90, gamma {gamma:g}", partial(labels, batch=batch, gamma=gamma))
        for gamma in ((1.5, 2.0) if on_gpu else (1.5,))
    ] + [
        Case(
            f"soft targets, {batch} x 810 x 64^2, gamma 2",
            partial(soft_targets, batch=batch, gamma=2.0),
            layouts=(CHANNELS_LAST, CONTIGUOUS),
        ),
    ]


def labels(device: torch.device, dtype: torch.dtype, layout: str, *, batch: int, gamma: float) -> Workload:
    """A class per anchor, -1 for background. Peers need a one-hot of it, which is part of what they take."""
    logits = logits_like_a_detector((batch, ANCHORS, CLASSES), device, dtype)
    classes = torch.full((batch, ANCHORS), -1, device=device)
    positive = torch.rand(classes.shape, device=device) < 0.002
    classes[positive] = torch.randint(CLASSES, (int(positive.sum()),), device=device)
    size, label_bytes = logits.numel() * logits.element_size(), classes.numel() * classes.element_size()

    def dense(x):
        return F.one_hot(classes + 1, CLASSES + 1)[..., 1:].to(x.dtype)

    workload = all_implementations(logits, lambda x: classes, dense, gamma)
    # Both together: the gradient can be written in the pass that reads the logits.
    workload.bytes = {FORWARD: size + label_bytes, BACKWARD: 2 * size + label_bytes, BOTH: 2 * size + label_bytes}
    return workload


def soft_targets(device, dtype, layout, *, batch: int, gamma: float, size: int = 64) -> Workload:
    """One level's head output with a target per logit."""
    memory_format = torch.channels_last if layout == CHANNELS_LAST else torch.contiguous_format
    logits = logits_like_a_detector((batch, 9 * CLASSES, size, size), device, dtype, memory_format)
    targets = torch.rand(logits.shape, device=device)
    targets = torch.where(targets < 0.01, 100 * targets, 0).to(dtype).contiguous(memory_format=memory_format)
    tensor_bytes = logits.numel() * logits.element_size()
    workload = all_implementations(logits, lambda x: targets.to(x.dtype), lambda x: targets.to(x.dtype), gamma)
    workload.bytes = {FORWARD: 2 * tensor_bytes, BACKWARD: 3 * tensor_bytes, BOTH: 3 * tensor_bytes}
    return workload


def logits_like_a_detector(shape, device, dtype, memory_format=torch.contiguous_format) -> torch.Tensor:
    """Mostly confident negatives, as after a little training."""
    logits = torch.randn(shape, device=device, dtype=torch.float32).mul_(2).sub_(4).to(dtype)
    return logits.contiguous(memory_format=memory_format).requires_grad_()


def all_implementations(logits, targets, dense, gamma) -> Workload:
    """`targets(x)` is what ours takes, `dense(x)` what the peers take, for logits x."""
    exact = oracle_copy(logits)
    absent: dict[str, str] = {}

    def reference(x):
        return ops.sigmoid_focal_loss_reference(x, targets(x), ALPHA, gamma, "sum")

    peers = {"eager": reference, "torch.compile": compiled(reference)}
    if torchvision := optional("torchvision.ops", absent):

        def of_torchvision(x):
            return torchvision.sigmoid_focal_loss(x, dense(x), ALPHA, gamma, "sum")

        peers["torchvision"] = of_torchvision
        peers["torchvision, compiled"] = compiled(of_torchvision)
    if effdet := optional("effdet.loss", absent):
        peers["effdet"] = lambda x: effdet.new_focal_loss(x, dense(x), ALPHA, gamma, 1.0, 0.0).sum()
    return Workload(
        ours=Implementation(
            OURS, lambda: ops.sigmoid_focal_loss(logits, targets(logits), ALPHA, gamma, "sum"), (logits,)
        ),
        oracle=Implementation("float64", lambda: reference(exact), (exact,)),
        bytes={},
        peers=[Implementation(name, partial(function, logits), (logits,)) for name, function in peers.items()],
        absent=absent,
    )
