"""What an exported file computes, as a module to be traced: from RGB bytes to boxes."""

from __future__ import annotations

import copy
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effdet_fast._choices import ACTIVATION_MODULES
from effdet_fast.detector import Detector
from effdet_fast.models import DetectionModel
from effdet_fast.models.detection_model import Outputs
from effdet_fast.nn import BatchNormAct2d, FrozenBatchNormAct2d
from effdet_fast.ops._boxes import decode_boxes, detections_of, is_empty


class Operators(Protocol):
    """Steps that each format does its own way."""

    def largest(self, values: Tensor, count: int) -> Tensor:
        """Places [B, count] of the largest of float32 values [B, N], descending; of equal ones the first come first."""

    def suppress(self, boxes: Tensor, labels: Tensor, takes_part: Tensor) -> Tensor:
        """Which boxes per-class non-maximum suppression keeps, bool [B, N].

        From boxes float32 [B, N, 4] by descending score, labels int64 [B, N] and which of them take part, bool [B, N]. What
        is kept past an image's `max_detections` first ones is open.
        """


class ExportedGraph(nn.Module):
    """Normalizes, runs a copy of the detector's model on the CPU, and finishes its outputs.

    Args:
        detector: Whose model; it stays as it is.
        finish: What follows the heads.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, detector: Detector, finish: Finish) -> None:
        super().__init__()
        model = copy.deepcopy(detector.model).to(device="cpu", dtype=torch.float32)
        self.model = _with_plain_batch_norms(model.to(memory_format=torch.contiguous_format))  # type: ignore[call-overload]
        self.finish = finish
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (detector.mean, detector.std))
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Outputs by name, of RGB uint8 [B, 3, H, W]."""
        return self.finish(self.model(images * self.scale + self.shift))


class Finish(nn.Module):
    """Base of what follows the heads: reads their outputs in the order of the anchors.

    Args:
        model: The detector's model.
    """

    anchors: Tensor
    limits: Tensor

    def __init__(self, model: DetectionModel) -> None:
        super().__init__()
        self.config = model.config
        height, width = self.config.image_size
        self.register_buffer("anchors", model.anchors("cpu").clone())
        self.register_buffer("limits", torch.tensor([width, height, width, height], dtype=torch.float32))

    def flat(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """Logits [B, N * C] and deltas [B, N, 4]."""
        logits, deltas = (torch.cat([x.permute(0, 2, 3, 1).flatten(1) for x in levels], 1) for levels in outputs)
        return logits, deltas.unflatten(1, (-1, 4))

    def boxes(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """xyxy in input pixels, clipped to the input."""
        return torch.minimum(decode_boxes(deltas, anchors, self.config.box_coder).clamp(min=0), self.limits)


class AllAnchors(Finish):
    """The box and the scores of each anchor."""

    def forward(self, outputs: Outputs) -> dict[str, Tensor]:
        logits, deltas = self.flat(outputs)
        scores = logits.unflatten(1, (-1, self.config.num_classes)).sigmoid()
        return {"boxes": self.boxes(deltas, self.anchors), "scores": scores}


class FinalDetections(Finish):
    """What `DetectionModel.predict` gives: the best candidates, non-maximum suppression, fixed shapes.

    Args:
        model: The detector's model.
        operators: The format's.
        score_threshold: Scores have to be above; None takes all.
        max_detections: Rows per image.
    """

    def __init__(
        self, model: DetectionModel, operators: Operators, score_threshold: float | None, max_detections: int
    ) -> None:
        super().__init__(model)
        self.operators, self.score_threshold, self.max_detections = operators, score_threshold, max_detections

    def forward(self, outputs: Outputs) -> dict[str, Tensor]:
        boxes, scores, labels = self.candidates(outputs)
        takes_part = ~is_empty(boxes)
        if self.score_threshold is not None:
            takes_part = takes_part & (scores.double() > self.score_threshold)
        kept = self.operators.suppress(boxes, labels, takes_part)
        # Candidates come by descending score: the first that are kept are the detections.
        count = boxes.shape[1]
        places = torch.where(kept, torch.arange(count, 0, -1), 0)
        places, picks = places.topk(min(self.max_detections, count), dim=1)
        picks = torch.where(places > 0, picks, -1)
        if count < self.max_detections:
            picks = F.pad(picks, (0, self.max_detections - count), value=-1)
        found = detections_of(boxes, scores.gather(1, picks.clamp(min=0)), labels, picks)
        return {"boxes": found.boxes, "scores": found.scores, "labels": found.labels, "counts": found.counts}

    def candidates(self, outputs: Outputs) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes [B, M, 4], scores and labels [B, M] of the largest logits, by descending score.

        As `effdet_fast.ops.decode_candidates_reference`, without sorting all logits.
        """
        config = self.config
        logits, deltas = self.flat(outputs)
        pools = [level.shape[1:].numel() for level in outputs[0]]
        if not config.candidates_per_level:
            pools = [sum(pools)]
        orders, start = [], 0
        for pool in logits.split(pools, 1):
            orders.append(self.operators.largest(pool, min(config.max_candidates, pool.shape[1])) + start)
            start += pool.shape[1]
        order = torch.cat(orders, 1)
        ranked = logits.gather(1, order)
        if len(pools) > 1:
            by_score = self.operators.largest(ranked, ranked.shape[1])
            ranked, order = ranked.gather(1, by_score), order.gather(1, by_score)
        rows = order // config.num_classes  # torch.div would become a division of float32 in ONNX
        deltas = deltas.gather(1, rows.unsqueeze(-1).expand(-1, -1, 4))
        return self.boxes(deltas, self.anchors[rows]), ranked.sigmoid(), order - rows * config.num_classes


def _with_plain_batch_norms(module: nn.Module) -> nn.Module:
    """With PyTorch's BatchNorms in place of ours: their formula, written out, would hide them from what runs the file."""
    if isinstance(module, BatchNormAct2d | FrozenBatchNormAct2d):
        plain = nn.BatchNorm2d(module.num_features, module.eps)
        plain.load_state_dict(module.state_dict(), strict=False)  # a missing weight or bias is the new one's 1 or 0
        return nn.Sequential(plain, ACTIVATION_MODULES[module.activation]())
    for name, child in module.named_children():
        setattr(module, name, _with_plain_batch_norms(child))
    return module
