"""Soft-NMS of the candidates of `bench_nms`: a batch of images, and one set of boxes.

The peer is effdet's function; it takes one image, and is called in a loop over them, as effdet does.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_nms import CLASSES, IOU_THRESHOLD, MAX_DETECTIONS, candidates, workload_of
from benchmarks.workload import Case, Implementation, Workload, optional
from effdet_fast import ops

OP = "soft_nms"
SIGMA = 0.5
SCORE_THRESHOLD = 0.001
MAX_BOXES_FOR_PEER = 10_000


def cases(device_type: str) -> list[Case]:
    float32 = (torch.float32,)
    return [
        Case(
            f"batched, padded: 4 images x 500 boxes x {CLASSES} classes",
            partial(padded, batch=4, count=500),
            dtypes=float32,
        ),
        Case(
            f"batched, padded: 16 images x 5000 boxes x {CLASSES} classes",
            partial(padded, batch=16, count=5000),
            dtypes=float32,
        ),
        Case("single: 500 boxes of one class, all that stay", partial(single, count=500), dtypes=float32),
    ]


def padded(device: torch.device, dtype: torch.dtype, layout: str, *, batch: int, count: int) -> Workload:
    boxes, scores, labels = candidates(batch, count, device, dtype)
    options: dict[str, Any] = {
        "max_detections": MAX_DETECTIONS,
        "score_threshold": SCORE_THRESHOLD,
        "method": "gaussian",
        "sigma": SIGMA,
    }

    def ours():
        found = ops.batched_nms_padded(boxes, scores, labels, IOU_THRESHOLD, **options)
        return found.scores, found.counts, found.indices

    def reference():
        found = ops.batched_nms_padded_reference(boxes.double(), scores.double(), labels, IOU_THRESHOLD, **options)
        return found.scores.to(dtype), found.counts, found.indices

    absent: dict[str, str] = {}
    peers = []
    if batch * count > MAX_BOXES_FOR_PEER:
        absent["effdet"] = "left out: a Python step per box, minutes for this case"
    elif effdet := optional("effdet.soft_nms", absent):
        peers.append(
            Implementation("effdet", partial(loop_over_images, effdet.batched_soft_nms, boxes, scores, labels))
        )
    workload = workload_of(ours, reference, peers, absent, boxes, scores, labels)
    # effdet shifts the boxes of a class by an offset, which rounds: which of two boxes of nearly one score is first can differ.
    workload.results_of_peers = 2
    return workload


def loop_over_images(soft_nms, boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """The same outputs from a function for one image, which finds all boxes before the best are taken."""
    batch = len(boxes)
    indices = torch.full((batch, MAX_DETECTIONS), -1, dtype=torch.int64, device=boxes.device)
    decayed = torch.zeros(batch, MAX_DETECTIONS, device=boxes.device)
    counts = torch.zeros(batch, dtype=torch.int64, device=boxes.device)
    for i in range(batch):
        kept, score = soft_nms(boxes[i], scores[i], labels[i], True, SIGMA, IOU_THRESHOLD, SCORE_THRESHOLD)
        counts[i] = count = min(len(kept), MAX_DETECTIONS)
        indices[i, :count], decayed[i, :count] = kept[:count], score[:count]
    return decayed, counts, indices


def single(device: torch.device, dtype: torch.dtype, layout: str, *, count: int) -> Workload:
    boxes, scores, _ = (x[0] for x in candidates(1, count, device, dtype))
    options: dict[str, Any] = {"sigma": SIGMA, "score_threshold": 0.05}

    def best_first(kept: Tensor, decayed: Tensor) -> tuple[Tensor, ...]:
        return decayed, kept

    absent: dict[str, str] = {}
    peers = []
    if effdet := optional("effdet.soft_nms", absent):

        def peer():
            return best_first(*effdet.soft_nms(boxes, scores, True, SIGMA, IOU_THRESHOLD, 0.05))

        peers.append(Implementation("effdet", peer))
    workload = workload_of(
        lambda: best_first(*ops.soft_nms(boxes, scores, **options)),
        lambda: best_first(*ops.soft_nms_reference(boxes, scores, **options)),
        peers,
        absent,
        boxes,
        scores,
    )
    workload.results_of_peers = 1
    return workload
