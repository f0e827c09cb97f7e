"""What calling an op costs beside its work: the time of a call on 16 elements, with PyTorch's nearest beside it.

python -m benchmarks.overhead [--seconds 0.5]
"""

import argparse
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from effdet_fast import ops

CALLS = 20  # timed together


class Call(NamedTuple):
    name: str
    run: Callable[[], Tensor]
    leaves: tuple[Tensor, ...] = ()


def calls() -> list[Call]:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape).requires_grad_()

    vector, x, other = leaf(16), leaf(1, 16, 1, 1), leaf(1, 16, 1, 1)
    filters, edges = leaf(16, 1, 3, 3), torch.ones(2).requires_grad_()
    samples, weight, bias = leaf(2, 8, 1, 1), leaf(8), leaf(8)
    running = torch.zeros(8), torch.ones(8)
    squeeze = leaf(4, 16, 1, 1), leaf(4), leaf(16, 4, 1, 1), leaf(16)
    logits, labels = leaf(4, 4), torch.tensor([0, 1, -1, -2])
    boxes, scores, classes = torch.tensor([[0.0, 0, 8, 8], [4, 4, 12, 12]]), torch.rand(2), torch.zeros(2).long()
    anchors = torch.tensor([[0.0, 0, 8, 8], [8, 0, 16, 8]])
    heads = [leaf(1, 8, 1, 1)], [leaf(1, 8, 1, 1)]
    targets = ops.match_anchors(anchors, boxes[None], classes[None])

    def detection_loss() -> Tensor:
        return ops.detection_loss(*heads, *targets, num_classes=4).total

    return [
        Call("F.silu", lambda: F.silu(vector), (vector,)),
        Call("F.conv2d, depthwise", lambda: F.conv2d(x, filters, padding=1, groups=16), (x, filters)),
        Call("depthwise_conv2d", lambda: ops.depthwise_conv2d(x, filters, padding=1), (x, filters)),
        Call(
            "F.batch_norm, F.silu",
            lambda: F.silu(F.batch_norm(samples, *running, weight, bias, True)),
            (samples, weight, bias),
        ),
        Call(
            "batch_norm_act",
            lambda: ops.batch_norm_act(samples, *running, weight, bias, True, activation="silu"),
            (samples, weight, bias),
        ),
        Call("squeeze_excite", lambda: ops.squeeze_excite(x, *squeeze), (x, *squeeze)),
        Call("weighted_fusion", lambda: ops.weighted_fusion([x, other], edges), (x, other, edges)),
        Call("sigmoid_focal_loss", lambda: ops.sigmoid_focal_loss(logits, labels, reduction="sum"), (logits,)),
        Call("detection_loss", detection_loss, (*heads[0], *heads[1])),
        Call("match_anchors", lambda: ops.match_anchors(anchors, boxes[None], classes[None]).labels),
        Call("nms", lambda: ops.nms(boxes, scores, 0.5)),
        Call("batched_nms", lambda: ops.batched_nms(boxes, scores, classes, 0.5)),
    ]


def microseconds(run: Callable[[], object], seconds: float) -> float:
    """The shortest time of a call, over groups of calls: what disturbs only adds."""
    shortest = float("inf")
    for _ in range(CALLS):
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(CALLS):
            run()
        shortest = min(shortest, time.perf_counter() - start)
    return 1e6 * shortest / CALLS


def forward(call: Call, seconds: float) -> float:
    with torch.no_grad():
        return microseconds(call.run, seconds)


def both(call: Call, seconds: float) -> float | None:
    if not call.leaves:
        return None
    upstream = torch.ones_like(call.run())
    return microseconds(lambda: torch.autograd.grad(call.run(), call.leaves, upstream), seconds)


def main(command_line: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.5, help="per measurement")
    seconds = parser.parse_args(command_line).seconds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{'us per call':24}{'forward':>10}{'forward + backward':>22}")
    for call in calls():
        gradient = both(call, seconds)
        print(f"{call.name:24}{forward(call, seconds):10.1f}{'' if gradient is None else f'{gradient:22.1f}'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
