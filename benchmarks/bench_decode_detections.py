"""From EfficientDet-D0's head outputs to detections: 90 classes, the best 5000 scores of an image, NMS at 0.5, 100 detections.

Logits as of a trained network: background around -6, and objects whose neighborhood of anchors scores high.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.workload import CHANNELS_LAST, CONTIGUOUS, FORWARD, OURS, Case, Implementation, Workload, optional
from effdet_fast import ops
from effdet_fast.models.anchors import AnchorCache
from effdet_fast.models.registry import model_config

OP = "decode_detections"
CLASSES, CANDIDATES, MAX_DETECTIONS, IOU_THRESHOLD = 90, 5000, 100, 0.5


def cases(device_type: str) -> list[Case]:
    return [
        Case("D0 at 512, batch 16", partial(d0, batch=16, image=512), (CONTIGUOUS, CHANNELS_LAST)),
        Case("D0 at 512, batch 1", partial(d0, batch=1, image=512), (CONTIGUOUS, CHANNELS_LAST)),
    ]


def d0(device: torch.device, dtype: torch.dtype, layout: str, *, batch: int, image: int) -> Workload:
    cls_outputs, box_outputs, anchors = outputs(batch, image, device, dtype, layout)
    options: dict[str, Any] = {"num_classes": CLASSES, "max_candidates": CANDIDATES}

    def ours():
        return results(ops.decode_detections(cls_outputs, box_outputs, anchors, **options))

    def reference():
        wide = ([x.double() for x in cls_outputs], [x.double() for x in box_outputs])
        return results(ops.decode_detections_reference(*wide, anchors.double(), **options))

    absent: dict[str, str] = {}
    peers = [Implementation("eager", lambda: results(in_pytorch(cls_outputs, box_outputs, anchors)))]
    if bench := optional("effdet.bench", absent):
        peers.append(Implementation("effdet", partial(in_effdet, bench, cls_outputs, box_outputs, anchors)))
    return Workload(
        ours=Implementation(OURS, ours),
        oracle=Implementation("reference", reference),
        bytes={FORWARD: sum(x.numel() * x.element_size() for x in (*cls_outputs, *box_outputs))},
        peers=peers,
        absent=absent,
        results_of_peers=1,  # which of two boxes near the threshold stays can differ
    )


def results(found: ops.Detections) -> tuple[Tensor, ...]:
    return found.scores, found.boxes


def outputs(
    batch: int, image: int, device: torch.device, dtype: torch.dtype, layout: str
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    config = replace(model_config("efficientdet_d0"), num_classes=CLASSES, image_size=(image, image))
    cache = AnchorCache(config)
    memory_format = torch.channels_last if layout == CHANNELS_LAST else torch.contiguous_format
    per_cell = config.anchors_per_cell
    cls_outputs, box_outputs = [], []
    for height, width in cache.sizes:
        logits = torch.randn(batch, per_cell * CLASSES, height, width, device=device) - 6
        logits += 3 * (torch.rand(batch, 1, height, width, device=device) < 0.02)  # objects
        deltas = 0.3 * torch.randn(batch, per_cell * 4, height, width, device=device)
        cls_outputs.append(logits.to(dtype).to(memory_format=memory_format))
        box_outputs.append(deltas.to(dtype).to(memory_format=memory_format))
    return cls_outputs, box_outputs, cache.boxes(device)


def in_pytorch(cls_outputs: list[Tensor], box_outputs: list[Tensor], anchors: Tensor) -> ops.Detections:
    """The whole batch at once: cat, top-k, gather, decode, and our NMS."""
    batch = len(cls_outputs[0])
    logits = torch.cat([x.permute(0, 2, 3, 1).flatten(1) for x in cls_outputs], 1)
    deltas = torch.cat([x.permute(0, 2, 3, 1).reshape(batch, -1, 4) for x in box_outputs], 1)
    top, order = torch.topk(logits, CANDIDATES, dim=1)
    index = torch.div(order, CLASSES, rounding_mode="floor")
    ty, tx, th, tw = deltas.gather(1, index.unsqueeze(2).expand(-1, -1, 4)).float().unbind(-1)
    x1, y1, x2, y2 = anchors[index].unbind(-1)
    half_w, half_h = tw.exp() * (x2 - x1) / 2, th.exp() * (y2 - y1) / 2
    x, y = tx * (x2 - x1) + (x1 + x2) / 2, ty * (y2 - y1) + (y1 + y2) / 2
    boxes = torch.stack([x - half_w, y - half_h, x + half_w, y + half_h], -1)
    scores = top.float().sigmoid()
    return ops.batched_nms_padded(boxes, scores, order - index * CLASSES, IOU_THRESHOLD, max_detections=MAX_DETECTIONS)


def in_effdet(bench, cls_outputs: list[Tensor], box_outputs: list[Tensor], anchors: Tensor) -> tuple[Tensor, ...]:
    """Its post-processing of a batch, which loops over the images; anchors are (y1, x1, y2, x2) there."""
    yxyx = anchors[:, [1, 0, 3, 2]]
    selected = bench._post_process(cls_outputs, box_outputs, len(cls_outputs), CLASSES, CANDIDATES)
    found = bench._batch_detection(
        len(cls_outputs[0]), selected[0], selected[1], yxyx, selected[2], selected[3], max_det_per_image=MAX_DETECTIONS
    )
    return found[..., 4], found[..., :4]
