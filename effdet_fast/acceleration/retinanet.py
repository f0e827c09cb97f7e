"""torchvision's RetinaNet: labels and losses, or the detections, of a whole batch at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from effdet_fast._choices import MAX_DECODED_LEVELS
from effdet_fast.acceleration.swap import Swap, reason_of_mismatch
from effdet_fast.ops.anchor_matching import match_anchors
from effdet_fast.ops.decode_detections import decode_detections
from effdet_fast.ops.detection_loss import detection_loss
from effdet_fast.ops.focal_loss import sigmoid_focal_loss

Targets = Sequence[Mapping[str, Tensor]]
BOX_LOSSES = ("l1", "smooth_l1", "giou")


def as_level(outputs: Tensor) -> Tensor:
    """A head's outputs [B, N, values] as the ops take a level: [B, values, N, 1] in channels_last, the same memory."""
    return outputs.transpose(1, 2).unsqueeze(3)


def reason_against_coder(coder: Any) -> str | None:
    if reason := reason_of_mismatch(coder, "torchvision.BoxCoder", "encode_single", "decode_single"):
        return reason
    if tuple(coder.weights) != (1.0, 1.0, 1.0, 1.0):
        return f"box coder weights {tuple(coder.weights)}"
    if coder.bbox_xform_clip != math.log(1000.0 / 16):
        return f"box coder limit {coder.bbox_xform_clip}"
    return None


class RetinaNetLoss(Swap):
    """No IoU matrix, one-hot or boolean index, and no loop over images; the gradients are written with the loss.

    The heads' own `compute_loss` are not called, so all of it must be torchvision's.
    """

    family, replacement = "detection_loss", "match_anchors + detection_loss"
    head: Any
    proposal_matcher: Any

    @classmethod
    def fits(cls, obj: Any) -> bool:
        return isinstance(obj, nn.Module) and reason_of_mismatch(obj, "torchvision.RetinaNet") is None

    @classmethod
    def reason_against(cls, obj: Any) -> str | None:
        head, matcher = obj.head, obj.proposal_matcher
        boxes = getattr(head, "regression_head", None)
        reason = (
            reason_of_mismatch(obj, "torchvision.RetinaNet", "compute_loss")
            or reason_of_mismatch(head, "torchvision.RetinaNetHead", "compute_loss")
            or reason_of_mismatch(head.classification_head, "torchvision.RetinaNetClassificationHead", "compute_loss")
            or reason_of_mismatch(boxes, "torchvision.RetinaNetRegressionHead", "compute_loss")
            or reason_of_mismatch(matcher, "torchvision.Matcher", "__call__", "set_low_quality_matches_")
            or reason_of_mismatch(
                obj.anchor_generator, "torchvision.AnchorGenerator", "forward"
            )  # the same for all images
            or reason_against_coder(boxes.box_coder)  # type: ignore[union-attr]
        )
        if reason:
            return reason
        if boxes._loss_type not in BOX_LOSSES:  # type: ignore[union-attr]
            return f"box loss {boxes._loss_type!r}"  # type: ignore[union-attr]
        if not matcher.low_threshold > 0:
            return f"matcher's low_threshold {matcher.low_threshold}"
        return None

    def compute_loss(
        self, targets: Targets, head_outputs: Mapping[str, Tensor], anchors: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        if not targets or RetinaNetLoss.reason_against(self):
            return super().compute_loss(targets, head_outputs, anchors)  # type: ignore[misc]
        matcher, logits = self.proposal_matcher, head_outputs["cls_logits"]
        matched = match_anchors(
            anchors[0],
            pad_sequence([each["boxes"] for each in targets], True, -1.0),
            pad_sequence([each["labels"] for each in targets], True, -1),
            pos_iou=matcher.high_threshold,
            neg_iou=matcher.low_threshold,
            force_match=False,
            allow_low_quality_matches=matcher.allow_low_quality_matches,
            box_coder="torchvision",
        )
        loss = detection_loss(
            [as_level(logits)],
            [as_level(head_outputs["bbox_regression"])],
            matched.labels,
            matched.boxes,
            matched.num_positives,
            num_classes=logits.shape[-1],
            gamma=2.0,
            delta=1.0,
            box_loss_weight=1.0,
            box_loss=self.head.regression_head._loss_type,
            normalizer="per_image",
            anchors=anchors[0],
            box_coder="torchvision",
        )
        return {"classification": loss.cls, "bbox_regression": loss.box}


class RetinaNetClassLoss(Swap):
    """The class loss alone, for whoever calls the head's: from labels, without a one-hot."""

    family, replacement = "focal_loss", "sigmoid_focal_loss"
    BETWEEN_THRESHOLDS: int

    @classmethod
    def fits(cls, obj: Any) -> bool:
        return isinstance(obj, nn.Module) and reason_of_mismatch(obj, "torchvision.RetinaNetClassificationHead") is None

    @classmethod
    def reason_against(cls, obj: Any) -> str | None:
        return reason_of_mismatch(obj, "torchvision.RetinaNetClassificationHead", "compute_loss")

    def compute_loss(
        self, targets: Targets, head_outputs: Mapping[str, Tensor], matched_idxs: Sequence[Tensor]
    ) -> Tensor:
        losses = []
        for objects, logits, matches in zip(targets, head_outputs["cls_logits"], matched_idxs, strict=False):
            found = matches >= 0
            labels = torch.where(matches == self.BETWEEN_THRESHOLDS, -2, -1)
            labels[found] = objects["labels"][matches[found]]
            losses.append(sigmoid_focal_loss(logits, labels, reduction="sum") / found.sum().clamp(min=1))
        return torch.stack(losses).sum() / len(targets)


class RetinaNetDetections(Swap):
    """Candidates, boxes and suppression of all images at once, and one transfer to the host.

    Detections carry no gradient: where one could be wanted, which is without `torch.no_grad()`, the original runs.
    """

    family, replacement = "nms", "decode_detections"
    score_thresh: float
    nms_thresh: float
    detections_per_img: int
    topk_candidates: int

    @classmethod
    def fits(cls, obj: Any) -> bool:
        return RetinaNetLoss.fits(obj)

    @classmethod
    def reason_against(cls, obj: Any) -> str | None:
        if reason := reason_of_mismatch(obj, "torchvision.RetinaNet", "postprocess_detections"):
            return reason
        if obj.detections_per_img < 1 or obj.topk_candidates < 1:
            return "no limit of detections"
        return reason_of_mismatch(
            obj.anchor_generator, "torchvision.AnchorGenerator", "forward"
        ) or reason_against_coder(obj.box_coder)

    def postprocess_detections(
        self,
        head_outputs: Mapping[str, Sequence[Tensor]],
        anchors: Sequence[Sequence[Tensor]],
        image_shapes: Sequence[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        logits, deltas = head_outputs["cls_logits"], head_outputs["bbox_regression"]
        outputs = (*logits, *deltas)
        wants_gradient = torch.is_grad_enabled() and any(each.requires_grad for each in outputs)
        known = len({each.dtype for each in outputs}) == 1 and len(logits) <= MAX_DECODED_LEVELS and image_shapes
        if wants_gradient or not known or RetinaNetDetections.reason_against(self):
            return super().postprocess_detections(head_outputs, anchors, image_shapes)  # type: ignore[misc]
        found = decode_detections(
            [as_level(level.contiguous()) for level in logits],
            [as_level(level.contiguous()) for level in deltas],
            torch.cat(list(anchors[0])),
            num_classes=logits[0].shape[-1],
            max_candidates=self.topk_candidates,
            score_threshold=self.score_thresh,
            iou_threshold=self.nms_thresh,
            max_detections=self.detections_per_img,
            clip_sizes=torch.tensor(image_shapes, dtype=torch.float32, device=logits[0].device),
            box_coder="torchvision",
            candidates_per_level=True,
        )
        boxes, scores = found.boxes.to(deltas[0].dtype), found.scores.to(logits[0].dtype)
        return [
            {"boxes": boxes[image, :count], "scores": scores[image, :count], "labels": found.labels[image, :count]}
            for image, count in enumerate(found.counts.tolist())
        ]
