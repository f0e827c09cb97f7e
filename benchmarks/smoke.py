"""Every op once, forward and backward, on small odd shapes on the GPU: what compute-sanitizer watches."""

from collections.abc import Callable
from typing import Any

import torch

from effdet_fast import ops

DTYPES = (torch.float32, torch.bfloat16)


def focal_loss(dtype: torch.dtype) -> None:
    logits = random((3, 129, 7), dtype)
    classes = torch.randint(-2, 7, (3, 129), device="cuda")
    for reduction in ("none", "sum"):
        ops.sigmoid_focal_loss(logits, classes, 0.25, 1.5, reduction).sum().backward()
    ops.sigmoid_focal_loss(logits, torch.rand_like(logits, requires_grad=False), 0.25, 2.0, "none").sum().backward()


def detection_loss(dtype: torch.dtype) -> None:
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for classes in (8, 7):
            outputs = [
                random((2, 3 * k, h, w), dtype, memory_format) for k in (classes, 4) for h, w in ((8, 8), (3, 5))
            ]
            count = 3 * (64 + 15)
            labels = torch.randint(-2, classes, (2, count), device="cuda")
            codes, positives = torch.randn(2, count, 4, device="cuda"), (labels >= 0).sum(1)
            corners = 50 * torch.rand(count, 2, device="cuda")
            boxes: dict[str, Any] = {
                "box_loss": "giou",
                "anchors": torch.cat([corners, corners + 9], 1),
                "normalizer": "per_image",
            }
            for options in ({}, boxes):
                loss = ops.detection_loss(
                    outputs[:2], outputs[2:], labels, codes, positives, num_classes=classes, **options
                )
                (2 * loss.total).backward(retain_graph=True)
                loss.box.backward()


def fusion(dtype: torch.dtype) -> None:
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for channels in (8, 11):
            inputs = [random((2, channels, side, side), dtype, memory_format) for side in (9, 5, 17)]
            weights = random((3,), torch.float32)
            resample = ("none", "nearest", "max_pool")
            ops.weighted_fusion(inputs, weights, resample=resample, activation="silu").sum().backward()


def depthwise_conv(dtype: torch.dtype) -> None:
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for channels, kernel, stride in ((8, 3, 1), (40, 5, 1), (88, 3, 2), (7, 5, 2)):
            x = random((2, channels, 13, 17), dtype, memory_format)
            weight, bias = random((channels, 1, kernel, kernel), dtype), random((channels,), dtype)
            ops.depthwise_conv2d(x, weight, bias, stride, "same", prologue="silu").sum().backward()
            levels = [
                x,
                random((2, channels, 5, 8), dtype, memory_format),
                random((1, channels, 1, 2), dtype, memory_format),
            ]
            ys = ops.depthwise_conv2d_levels(levels, weight, bias, stride, "same")
            torch.cat([y.flatten() for y in ys]).sum().backward()


def nms(dtype: torch.dtype) -> None:
    corners = 100 * torch.rand(3, 333, 2, device="cuda")
    boxes = torch.cat([corners, corners + 20], -1).to(dtype)
    scores, labels = torch.rand(3, 333, device="cuda").to(dtype), torch.randint(5, (3, 333), device="cuda")
    ops.batched_nms_padded(boxes, scores, labels, 0.5, max_detections=50, score_threshold=0.1)
    ops.batched_nms(boxes[0], scores[0], labels[0], 0.5)
    ops.nms(boxes[0], scores[0], 0.5)


def soft_nms(dtype: torch.dtype) -> None:
    corners = 100 * torch.rand(3, 333, 2, device="cuda")
    boxes = torch.cat([corners, corners + 20], -1).to(dtype)
    scores, labels = torch.rand(3, 333, device="cuda").to(dtype), torch.randint(5, (3, 333), device="cuda")
    for method in ("gaussian", "linear"):
        ops.batched_nms_padded(boxes, scores, labels, 0.3, max_detections=50, score_threshold=0.1, method=method)
        ops.soft_nms(boxes[0], scores[0], labels[0], method=method)


def anchor_matching(dtype: torch.dtype) -> None:
    corners = 100 * torch.rand(333, 2, device="cuda")
    anchors = torch.cat([corners, corners + 20], -1).to(dtype)
    labels = torch.randint(-1, 5, (3, 40), device="cuda")
    for forced in (True, False):
        ops.match_anchors(
            anchors, anchors[:120].view(3, 40, 4), labels, force_match=forced, allow_low_quality_matches=not forced
        )


def batch_norm_act(dtype: torch.dtype) -> None:
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for shape in ((2, 40, 13, 17), (3, 7, 16, 16), (2, 88, 3, 3)):
            x = random(shape, dtype, memory_format)
            weight, bias = random(shape[1:2], torch.float32), random(shape[1:2], torch.float32)
            ops.batch_norm_act(x, None, None, weight, bias, True, activation="silu").sum().backward()


def decode_detections(dtype: torch.dtype) -> None:
    corners = 100 * torch.rand(9 * 187, 2, device="cuda")
    anchors = torch.cat([corners, corners + 20], -1)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        cls_outputs, box_outputs = (
            [random((2, 9 * values, h, w), dtype, memory_format) for h, w in ((13, 11), (9, 4), (4, 2))]
            for values in (7, 4)
        )
        ops.decode_detections(cls_outputs, box_outputs, anchors, num_classes=7, max_candidates=500)


def squeeze_excite(dtype: torch.dtype) -> None:
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for shape in ((2, 40, 13, 17), (3, 7, 64, 64), (2, 88, 3, 3)):
            weights = [random(s, torch.float32) for s in ((5, shape[1], 1, 1), (5,), (shape[1], 5, 1, 1), shape[1:2])]
            ops.squeeze_excite(random(shape, dtype, memory_format), *weights).sum().backward()


RUNS: tuple[Callable[[torch.dtype], None], ...] = (
    focal_loss,
    detection_loss,
    fusion,
    depthwise_conv,
    nms,
    soft_nms,
    anchor_matching,
    batch_norm_act,
    decode_detections,
    squeeze_excite,
)


def random(shape: tuple[int, ...], dtype: torch.dtype, memory_format=torch.contiguous_format) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=memory_format).requires_grad_()


def main() -> None:
    torch.manual_seed(0)
    for run in RUNS:
        for dtype in DTYPES:
            run(dtype)
            torch.cuda.synchronize()  # so that what goes wrong is told beside its op
            print(f"{run.__name__} {dtype}: ran", flush=True)


if __name__ == "__main__":
    main()
