"""One small call of every op, for what must hold of all of them."""

import torch

from effdet_fast import random_calls
from effdet_fast.random_calls import Call, Draw

PLAIN, SMALL = (2, 3, 6, 6), (3, 3)


def differentiable_calls() -> dict[str, Call]:
    """In float64; no tensor is a leaf of anything."""
    draw = Draw(dtype=torch.float64)
    silu = {"prologue": "silu"}
    calls = {
        "focal_soft": random_calls.focal_loss(draw, 4, 5, soft=True),
        "focal_labels": random_calls.focal_loss(draw, 2, 3, 4, reduction="sum"),
        "fusion": random_calls.fusion(draw, ["max_pool", "none"], SMALL, channels=3, activation="silu"),
        "fusion_nearest": random_calls.fusion(draw, ["none", "nearest"], (6, 6), channels=3, method="softmax"),
        "depthwise": random_calls.depthwise_conv(draw, *PLAIN, stride=2, padding="same", **silu),
        "levels": random_calls.depthwise_conv_levels(draw, [(2, 6, 6), (2, 3, 3)], 3, bias=False, padding=1, **silu),
        "separable": random_calls.separable_conv(draw, *PLAIN, outputs=5, padding=1, **silu),
        "batch_norm_eval": random_calls.batch_norm(draw, *PLAIN, training=False, activation="silu"),
        "batch_norm_train": random_calls.batch_norm(draw, *PLAIN, activation="silu"),
        "squeeze_excite": random_calls.squeeze_excite(draw, *PLAIN, squeezed=2),
    }
    for box_loss in ("huber", "l1", "smooth_l1", "giou"):
        loss = random_calls.detection_loss(draw, [(4, 4)], classes=3, box_loss=box_loss)
        calls[f"detection_loss_{box_loss}"] = loss
    return calls


def calls_without_gradient() -> dict[str, Call]:
    draw = Draw()
    return {
        "match_anchors": random_calls.match_anchors(draw, 12, images=2, max_boxes=3),
        "batched_nms_padded": random_calls.nms_padded(draw, 2, 12),
        "soft_nms_padded": random_calls.nms_padded(draw, 2, 12, method="linear"),
        "decode_detections": random_calls.decode_detections(draw, [(2, 3)], classes=3),
    }


def calls_of_unknown_size() -> dict[str, Call]:
    """Whose results have as many rows as the values say."""
    draw = Draw()
    return {
        "nms": random_calls.nms(draw, 12),
        "batched_nms": random_calls.batched_nms(draw, 12),
        "soft_nms": random_calls.soft_nms(draw, 12),
    }
