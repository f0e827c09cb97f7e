"""One small call of every op, for what must hold of all of them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from effdet_fast import ops


class Call(NamedTuple):
    function: Callable  # of all tensors
    differentiable: tuple[Tensor, ...] = ()  # float64, not a leaf of anything
    others: tuple[Tensor, ...] = ()

    def __call__(self, *differentiable: Tensor):
        return self.function(*differentiable, *self.others)


def differentiable_calls() -> dict[str, Call]:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, small, channels = random(2, 3, 6, 6), random(2, 3, 3, 3), (random(3), random(3))
    filters, running = random(3, 1, 3, 3), (random(3), random(3).square() + 0.5)
    excite = (random(2, 3, 1, 1), random(2), random(3, 2, 1, 1), random(3))
    labels = torch.tensor([[0, -1, -2], [1, 0, 0]])
    calls = {
        "focal_soft": Call(ops.sigmoid_focal_loss, (random(4, 5),), (random(4, 5).sigmoid(),)),
        "focal_labels": Call(lambda a, t: ops.sigmoid_focal_loss(a, t, reduction="sum"), (random(2, 3, 4),), (labels,)),
        "fusion": Call(
            lambda a, b, w: ops.weighted_fusion([a, b], w, resample=["max_pool", "none"], activation="silu"),
            (x, small, random(2).square()),
        ),
        "fusion_nearest": Call(
            lambda a, b, w: ops.weighted_fusion([a, b], w, resample=["none", "nearest"], method="softmax"),
            (x, small, random(2)),
        ),
        "depthwise": Call(
            lambda a, w, b: ops.depthwise_conv2d(a, w, b, 2, "same", prologue="silu"), (x, filters, channels[0])
        ),
        "levels": Call(
            lambda a, b, w: torch.cat(
                [y.flatten() for y in ops.depthwise_conv2d_levels([a, b], w, None, 1, 1, prologue="silu")]
            ),
            (x, small, filters),
        ),
        "separable": Call(
            lambda a, w, p: ops.depthwise_separable_conv2d(a, w, p, None, 1, 1, prologue="silu"),
            (x, filters, random(5, 3, 1, 1)),
        ),
        "batch_norm_eval": Call(
            lambda a, w, b, *r: ops.batch_norm_act(a, *r, w, b, activation="silu"), (x, *channels), running
        ),
        "batch_norm_train": Call(
            lambda a, w, b, *r: ops.batch_norm_act(a, *r, w, b, True, activation="silu"), (x, *channels), running
        ),
        "squeeze_excite": Call(ops.squeeze_excite, (x, *excite)),
    }
    corners = 8 * random(32, 2).sigmoid()
    anchors = torch.cat([corners, corners + 2 + random(32, 2).sigmoid()], 1)
    labels = torch.randint(-2, 3, (2, 32), generator=generator)
    targets = (labels, random(2, 32, 4) * 0.3, (labels >= 0).sum(1).double(), anchors)
    for box_loss in ("huber", "l1", "smooth_l1", "giou"):

        def loss(a, b, labels, codes, positives, anchors, box_loss=box_loss):
            options = {"num_classes": 3, "box_loss": box_loss, "anchors": anchors}
            return ops.detection_loss([a], [b], labels, codes, positives, **options).total

        calls[f"detection_loss_{box_loss}"] = Call(loss, (random(2, 6, 4, 4), random(2, 8, 4, 4) * 0.2), targets)
    return calls


def calls_without_gradient() -> dict[str, Call]:
    generator = torch.Generator().manual_seed(2)
    corners = 8 * torch.rand(2, 12, 2, generator=generator)
    boxes = torch.cat([corners, corners + 3], 2)
    scores = torch.rand(2, 12, generator=generator)
    labels = torch.randint(0, 3, (2, 12), generator=generator)
    heads = (torch.randn(2, 6, 2, 3, generator=generator), torch.randn(2, 8, 2, 3, generator=generator))
    return {
        "match_anchors": Call(ops.match_anchors, (), (boxes[0], boxes[:, :3], labels[:, :3], torch.tensor([2, 3]))),
        "batched_nms_padded": Call(lambda *t: ops.batched_nms_padded(*t, 0.5), (), (boxes, scores, labels)),
        "soft_nms_padded": Call(
            lambda *t: ops.batched_nms_padded(*t, 0.5, method="linear"), (), (boxes, scores, labels)
        ),
        "decode_detections": Call(
            lambda a, b, anchors: ops.decode_detections([a], [b], anchors, num_classes=3), (), (*heads, boxes[0])
        ),
    }


def calls_of_unknown_size() -> dict[str, Call]:
    """Whose results have as many rows as the values say."""
    boxes, scores, labels = (t[0] for t in calls_without_gradient()["batched_nms_padded"].others)
    return {
        "nms": Call(lambda *t: ops.nms(*t, 0.5), (), (boxes, scores)),
        "batched_nms": Call(lambda *t: ops.batched_nms(*t, 0.5), (), (boxes, scores, labels)),
        "soft_nms": Call(ops.soft_nms, (), (boxes, scores, labels)),
    }
