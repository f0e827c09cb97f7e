"""The whole loss of EfficientDet-D0 at 512: five levels, 49104 anchors x 90 classes an image, focal and Huber."""

from functools import partial

import torch

from benchmarks.bench_focal_loss import logits_like_a_detector
from benchmarks.workload import (
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

OP = "detection_loss"
SIZES = (64, 32, 16, 8, 4)
PER_CELL, CLASSES = 9, 90
OPTIONS = {"num_classes": CLASSES, "alpha": 0.25, "gamma": 1.5, "delta": 0.1, "box_loss_weight": 50.0}


def cases(device_type: str) -> list[Case]:
    batch = 16 if device_type == "cuda" else 4
    build = partial(pyramid, batch=batch, sizes=SIZES)
    return [Case(f"D0, {batch} x 49104 anchors x 90, focal + Huber", build, layouts=(CHANNELS_LAST, CONTIGUOUS))]


def pyramid(device: torch.device, dtype: torch.dtype, layout: str, *, batch: int, sizes: tuple[int, ...]) -> Workload:
    """Head outputs of all levels, and targets as a labeler leaves them: 0.2 % positives."""
    memory_format = torch.channels_last if layout == CHANNELS_LAST else torch.contiguous_format

    def outputs(values: int) -> list[torch.Tensor]:
        shapes = [(batch, PER_CELL * values, size, size) for size in sizes]
        return [logits_like_a_detector(shape, device, dtype, memory_format) for shape in shapes]

    leaves = (*outputs(CLASSES), *outputs(4))
    counts = [PER_CELL * size * size for size in sizes]
    positive = torch.rand((batch, sum(counts)), device=device) < 0.002
    labels = torch.where(positive, torch.randint(CLASSES, positive.shape, device=device), -1)
    deltas = torch.where(positive.unsqueeze(2), 0.3 * torch.randn((*positive.shape, 4), device=device), 0.0)
    positives = positive.sum(1).float()
    # effdet takes the targets in levels.
    shapes = [(batch, size, size, PER_CELL) for size in sizes]
    level_labels = [x.reshape(s) for x, s in zip(labels.split(counts, 1), shapes, strict=True)]
    level_deltas = [x.reshape(*s[:3], 4 * s[3]) for x, s in zip(deltas.split(counts, 1), shapes, strict=True)]

    def total_of(function, targets, outputs) -> torch.Tensor:
        levels = len(sizes)
        return function(list(outputs[:levels]), list(outputs[levels:]), *targets, **OPTIONS)[0]

    def implementation(name, function, targets, outputs) -> Implementation:
        return Implementation(name, partial(total_of, function, targets, outputs), outputs)

    absent: dict[str, str] = {}
    concat, split = (labels, deltas, positives), (level_labels, level_deltas, positives)
    peers = []
    if effdet := optional("effdet.loss", absent):
        peers.append(implementation("effdet", effdet.loss_fn, split, leaves))
        peers.append(implementation("effdet, compiled", compiled(effdet.loss_fn), split, leaves))
    read = sum(x.numel() * x.element_size() for x in (*leaves, labels, deltas))
    written = sum(x.numel() * x.element_size() for x in leaves)
    exact = tuple(oracle_copy(x) for x in leaves)
    return Workload(
        ours=implementation(OURS, ops.detection_loss, concat, leaves),
        oracle=implementation(
            "float64", ops.detection_loss_reference, (labels, deltas.double(), positives.double()), exact
        ),
        bytes={FORWARD: read, BOTH: read + written},  # the gradient can be written in the pass that reads the outputs
        peers=peers,
        absent=absent,
    )
