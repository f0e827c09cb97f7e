"""What PyTorch's own operators make of the two steps of detection that are more than arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._higher_order_ops import while_loop

from effdet_fast.ops._boxes import iou_with


class TorchOperators:
    """For programs of torch.export. Methods as of `effdet_fast.export.graph.Operators`.

    Args:
        iou_threshold: Boxes of the same class above this IoU are suppressed.
        max_detections: Per image; the work stops there.
    """

    def __init__(self, iou_threshold: float, max_detections: int) -> None:
        self.iou_threshold, self.max_detections = iou_threshold, max_detections

    def largest(self, values: Tensor, count: int) -> Tensor:
        # topk gives any of equal values, so it gets integers of which no two are equal. The bits of a float32 are a sign and a
        # magnitude; with the sign applied they are in the order of the values, -0.0 equal to 0.0. The place goes behind them.
        bits = values.view(torch.int32)
        ranks = torch.where(bits < 0, -(2**31) - bits, bits).long()
        places = torch.arange(values.shape[1] - 1, -1, -1)
        return (ranks * 2**32 + places).topk(count, dim=1).indices

    def suppress(self, boxes: Tensor, labels: Tensor, takes_part: Tensor) -> Tensor:
        """Keeps the best box left of every image at once, until each image has enough or no more."""

        def goes_on(step: Tensor, alive: Tensor, kept: Tensor) -> Tensor:
            return (step < self.max_detections) & alive.any()

        def keep_best(step: Tensor, alive: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            best = alive.long().argmax(1, keepdim=True)  # the first that is alive, where there is one
            box = boxes.gather(1, best.unsqueeze(-1).expand(-1, -1, 4))
            rivals = labels == labels.gather(1, best)
            suppressed = (iou_with(box, boxes).double() > self.iou_threshold) & rivals
            is_best = torch.zeros_like(alive).scatter(1, best, True) & alive
            return step + 1, alive & ~suppressed & ~is_best, kept | is_best

        start = (torch.zeros((), dtype=torch.int64), takes_part, torch.zeros_like(takes_part))
        return while_loop(goes_on, keep_best, start)[2]
