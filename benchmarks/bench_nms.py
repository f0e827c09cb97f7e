"""Non-maximum suppression of candidate boxes as a detector makes them: many overlapping boxes round each object.

torchvision has no function for a batch of images; it is called in a loop over them, as its users do.
"""

from functools import partial

import torch
from torch import Tensor

from benchmarks.workload import FORWARD, OURS, Case, Implementation, Workload, optional
from effdet_fast import ops

OP = "nms"
IOU_THRESHOLD = 0.5
MAX_DETECTIONS = 100
CLASSES = 90


def cases(device_type: str) -> list[Case]:
    float32 = (torch.float32,)
    return [
        Case(
            "batched, padded: 16 images x 5000 boxes x 90 classes",
            partial(padded, batch=16, count=5000),
            dtypes=float32,
        ),
        Case(
            "batched, padded: 1 image x 5000 boxes x 90 classes", partial(padded, batch=1, count=5000), dtypes=float32
        ),
        Case(
            "batched, padded: 16 images x 5000 boxes x 90 classes, up to 2000 stay",
            partial(padded, batch=16, count=5000, max_detections=2000),
            dtypes=float32,
        ),
        Case("single: 16 boxes", partial(single, count=16), dtypes=float32),
        Case("single: 1000 boxes", partial(single, count=1000), dtypes=float32),
        Case("single: 2000 boxes", partial(single, count=2000), dtypes=float32),
        Case("single: 10000 boxes", partial(single, count=10000), dtypes=float32),
        Case(
            "single: 100000 boxes, 500 round each object", partial(single, count=100000, per_object=500), dtypes=float32
        ),
    ]


def padded(
    device: torch.device,
    dtype: torch.dtype,
    layout: str,
    *,
    batch: int,
    count: int,
    max_detections: int = MAX_DETECTIONS,
) -> Workload:
    boxes, scores, labels = candidates(batch, count, device, dtype)

    def ours():
        found = ops.batched_nms_padded(boxes, scores, labels, IOU_THRESHOLD, max_detections=max_detections)
        return found.scores, found.counts, found.indices, found.labels, found.boxes

    def reference():
        found = ops.batched_nms_padded_reference(boxes, scores, labels, IOU_THRESHOLD, max_detections=max_detections)
        return found.scores, found.counts, found.indices, found.labels, found.boxes

    absent: dict[str, str] = {}
    peers = []
    if torchvision := optional("torchvision.ops", absent):
        loop = partial(loop_over_images, torchvision.batched_nms, boxes, scores, labels, max_detections)
        peers.append(Implementation("torchvision", loop))
    workload = workload_of(ours, reference, peers, absent, boxes, scores, labels)
    # torchvision shifts the boxes of a class by an offset, which rounds: which of two boxes near the threshold stays can differ.
    workload.results_of_peers = 2
    return workload


def loop_over_images(
    batched_nms, boxes: Tensor, scores: Tensor, labels: Tensor, max_detections: int
) -> tuple[Tensor, ...]:
    """The same outputs from a function for one image."""
    batch = len(boxes)
    indices = torch.full((batch, max_detections), -1, dtype=torch.int64, device=boxes.device)
    counts = torch.zeros(batch, dtype=torch.int64, device=boxes.device)
    for i in range(batch):
        keep = batched_nms(boxes[i], scores[i], labels[i], IOU_THRESHOLD)[:max_detections]
        indices[i, : len(keep)] = keep
        counts[i] = len(keep)
    there, safe = indices >= 0, indices.clamp(min=0)
    return (
        scores.gather(1, safe) * there,
        counts,
        indices,
        labels.gather(1, safe).masked_fill(~there, -1),
        boxes.gather(1, safe[..., None].expand(-1, -1, 4)) * there[..., None],
    )


def single(device: torch.device, dtype: torch.dtype, layout: str, *, count: int, per_object: int = 25) -> Workload:
    boxes, scores, _ = (x[0] for x in candidates(1, count, device, dtype, per_object))
    absent: dict[str, str] = {}
    peers = []
    if torchvision := optional("torchvision.ops", absent):
        peers.append(Implementation("torchvision", lambda: torchvision.nms(boxes, scores, IOU_THRESHOLD)))
    reference = partial(ops.nms_reference, boxes, scores, IOU_THRESHOLD)
    return workload_of(lambda: ops.nms(boxes, scores, IOU_THRESHOLD), reference, peers, absent, boxes, scores)


def workload_of(ours, reference, peers, absent, *inputs: Tensor) -> Workload:
    """Bytes: the inputs, read once. The oracle compares in the inputs' dtype, as the op is defined."""
    return Workload(
        ours=Implementation(OURS, ours),
        oracle=Implementation("reference", reference),
        bytes={FORWARD: sum(x.numel() * x.element_size() for x in inputs)},
        peers=peers,
        absent=absent,
    )


def candidates(
    batch: int, count: int, device: torch.device, dtype: torch.dtype, per_object: int = 25
) -> tuple[Tensor, Tensor, Tensor]:
    """About so many boxes round each object of a 512 x 512 image, most of them of its class; all scores differ."""
    objects = max(1, count // per_object)
    centers = torch.rand(batch, objects, 2, device=device) * 512
    sizes = torch.exp(torch.rand(batch, objects, 2, device=device) * 3 + 2)
    classes = torch.randint(CLASSES, (batch, objects), device=device)
    owner = torch.randint(objects, (batch, count), device=device)
    pick = owner[..., None].expand(-1, -1, 2)
    size = sizes.gather(1, pick) * torch.exp(0.2 * torch.randn(batch, count, 2, device=device))
    center = centers.gather(1, pick) + 0.15 * size * torch.randn(batch, count, 2, device=device)
    boxes = torch.cat([center - size / 2, center + size / 2], -1).clamp(0, 512)
    other = torch.rand(batch, count, device=device) < 0.2
    labels = torch.where(other, torch.randint(CLASSES, (batch, count), device=device), classes.gather(1, owner))
    ranks = torch.argsort(torch.rand(batch, count, device=device), 1)
    return boxes.to(dtype), ((ranks + 1) / (count + 1)).to(dtype), labels
