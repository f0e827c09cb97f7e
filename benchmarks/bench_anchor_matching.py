"""Label assignment: the targets of a batch at EfficientDet-D0's anchors, from padded ground truth.

effdet's labeler takes the images one by one, without padding; torchvision has its matcher and coder only as parts of RetinaNet's
loss, so its loop over the images is written out here.
"""

from functools import partial

import torch
from torch import Tensor

from benchmarks.workload import FORWARD, OURS, Case, Implementation, Workload, optional
from effdet_fast import ops
from effdet_fast.models import model_config
from effdet_fast.models.anchors import generate_anchors

OP = "anchor_matching"
SIZE = 512
CLASSES = 90
RETINANET = dict(pos_iou=0.5, neg_iou=0.4, force_match=False, allow_low_quality_matches=True, box_coder="torchvision")


def cases(device_type: str) -> list[Case]:
    float32 = (torch.float32,)
    return [
        Case("effdet's rule, D0, batch 16, 0-100 boxes", partial(effdet_rule, batch=16, max_boxes=100), dtypes=float32),
        Case("effdet's rule, D0, batch 4, 0-20 boxes", partial(effdet_rule, batch=4, max_boxes=20), dtypes=float32),
        Case(
            "RetinaNet's rule, D0, batch 16, 1-100 boxes",
            partial(retinanet_rule, batch=16, max_boxes=100),
            dtypes=float32,
        ),
    ]


def effdet_rule(device: torch.device, dtype: torch.dtype, layout: str, *, batch: int, max_boxes: int) -> Workload:
    anchors = generate_anchors(model_config("efficientdet_d0")).to(device)
    boxes, labels = objects(batch, max_boxes, 0, device)
    absent: dict[str, str] = {}
    peers = []
    if effdet := optional("effdet", absent):
        from effdet.anchors import AnchorLabeler, Anchors

        config = effdet.get_efficientdet_config("tf_efficientdet_d0")
        config.image_size = (SIZE, SIZE)
        labeler = AnchorLabeler(Anchors.from_config(config).to(device), CLASSES)
        there = labels >= 0
        gt_boxes = [image[keep][:, [1, 0, 3, 2]] for image, keep in zip(boxes, there, strict=True)]
        gt_classes = [image[keep] + 1 for image, keep in zip(labels, there, strict=True)]

        def theirs() -> tuple[Tensor, ...]:
            classes, deltas, positives = labeler.batch_label_anchors(gt_boxes, gt_classes)
            deltas = torch.cat([level.flatten(1).unflatten(1, (-1, 4)) for level in deltas], 1)
            return positives, deltas, torch.cat([level.flatten(1) for level in classes], 1)

        peers.append(Implementation("effdet", theirs))
    workload = workload_of(anchors, boxes, labels, {}, peers, absent)
    # Which of several objects gets the anchor that is best for all of them is open in effdet; how many are positive is not.
    workload.results_of_peers = 1
    return workload


def retinanet_rule(device: torch.device, dtype: torch.dtype, layout: str, *, batch: int, max_boxes: int) -> Workload:
    anchors = generate_anchors(model_config("efficientdet_d0")).to(device)
    boxes, labels = objects(batch, max_boxes, 1, device)
    absent: dict[str, str] = {}
    peers = []
    if (detection := optional("torchvision.models.detection._utils", absent)) and (
        torchvision := optional("torchvision.ops", absent)
    ):
        matcher = detection.Matcher(0.5, 0.4, allow_low_quality_matches=True)
        coder = detection.BoxCoder((1.0, 1.0, 1.0, 1.0))
        images = [(b[c >= 0], c[c >= 0]) for b, c in zip(boxes, labels, strict=True)]

        def theirs() -> tuple[Tensor, ...]:
            per_image = []
            for gt, classes in images:
                matches = matcher(torchvision.box_iou(gt, anchors))
                positive, row = matches >= 0, matches.clamp(min=0)
                deltas = torch.where(positive[:, None], coder.encode_single(gt[row], anchors), 0.0)
                per_image.append((positive.sum().float(), deltas, torch.where(positive, classes[row], matches)))
            return tuple(map(torch.stack, zip(*per_image, strict=True)))

        peers.append(Implementation("torchvision", theirs))
    return workload_of(anchors, boxes, labels, RETINANET, peers, absent)


def workload_of(anchors: Tensor, boxes: Tensor, labels: Tensor, rule: dict, peers, absent) -> Workload:
    """Bytes: anchors and ground truth read once, 24 bytes of labels and deltas written per anchor and image."""

    def ordered(targets: ops.AnchorTargets) -> tuple[Tensor, ...]:
        return targets.num_positives, targets.boxes, targets.labels

    inputs = sum(x.numel() * x.element_size() for x in (anchors, boxes, labels))
    return Workload(
        ours=Implementation(OURS, lambda: ordered(ops.match_anchors(anchors, boxes, labels, **rule))),
        oracle=Implementation(
            "reference", lambda: ordered(ops.match_anchors_reference(anchors, boxes, labels, **rule))
        ),
        bytes={FORWARD: inputs + len(boxes) * (len(anchors) * 24 + 4)},
        peers=peers,
        absent=absent,
    )


def objects(batch: int, max_boxes: int, fewest: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Padded boxes and classes: between `fewest` and `max_boxes` objects in an image, sides from 8 to 400 pixels."""
    half = torch.exp(torch.rand(batch, max_boxes, 2) * 3.9 + 2.1) / 2
    center = torch.rand(batch, max_boxes, 2) * SIZE
    boxes = torch.cat([center - half, center + half], -1).clamp(0, SIZE)
    labels = torch.randint(CLASSES, (batch, max_boxes))
    counts = torch.linspace(fewest, max_boxes, batch).round()
    labels[torch.arange(max_boxes) >= counts[:, None]] = -1
    return boxes.to(device), labels.to(device)
