"""A one-stage detector: backbone, neck and heads, with its loss and post-processing."""

from __future__ import annotations

from contextlib import nullcontext
from numbers import Real
from typing import overload

import torch
from torch import nn

from effdet_fast.models.anchors import AnchorCache
from effdet_fast.models.backbones import create_backbone
from effdet_fast.models.config import DetectorConfig
from effdet_fast.models.heads import PRIOR_PROBABILITY, Head
from effdet_fast.models.necks import create_neck
from effdet_fast.models.targets import Targets, check_objects, padded_targets
from effdet_fast.ops import (
    AnchorTargets,
    DetectionLoss,
    Detections,
    decode_detections,
    detection_loss,
    match_anchors,
    use_reference,
)

Outputs = tuple[list[torch.Tensor], list[torch.Tensor]]


def check_detection_options(
    caller: str, score_threshold: float | None, iou_threshold: float | None, max_detections: int | None
) -> None:
    """Raise TypeError or ValueError unless the given thresholds lie in [0, 1] and `max_detections` is at least 1."""
    options = {"score_threshold": score_threshold, "iou_threshold": iou_threshold, "max_detections": max_detections}
    for name, value in options.items():
        if value is not None and not isinstance(value, Real):
            raise TypeError(f"{caller}: {name} must be a number, got {type(value).__name__}")
        if name != "max_detections" and value is not None and not 0 <= value <= 1:
            raise ValueError(f"{caller}: {name} must be in [0, 1], got {value}")
    if max_detections is not None and max_detections < 1:
        raise ValueError(f"{caller}: max_detections must be >= 1, got {max_detections}")


class DetectionModel(nn.Module):
    """A one-stage detector on the fused operators: backbone, neck, class head and box head.

    Source: EfficientDet (Tan, Pang and Le, arXiv:1911.09070) and RetinaNet (Lin et al., arXiv:1708.02002). State-dict keys of
    EfficientDets are effdet's. It runs fastest in channels_last, which every feature map then keeps: call
    `model.to(memory_format=torch.channels_last)` and give images in the same format.

    Args:
        config: What to build; `create_model` looks one up by name.

    Attributes:
        config: The configuration.
        backbone: Turns images into the maps [C3, C4, C5].
        fpn: The neck, which turns those into the pyramid's levels.
        class_net: The class head.
        box_net: The box head.
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = create_backbone(config)
        self.fpn = create_neck(self.backbone.feature_channels, config)  # type: ignore[arg-type]
        self.class_net = Head(config.num_classes, config, prior=PRIOR_PROBABILITY)
        self.box_net = Head(4, config)
        self._anchors = AnchorCache(config)

    @overload
    def forward(self, images: torch.Tensor) -> Outputs: ...

    @overload
    def forward(self, images: torch.Tensor, targets: Targets) -> DetectionLoss: ...

    def forward(self, images: torch.Tensor, targets: Targets | None = None) -> Outputs | DetectionLoss:
        """Compute the raw outputs of the heads; with targets, the training loss.

        Args:
            images: float [B, 3, H, W], RGB, normalized with the configuration's mean and std; (H, W) is
                `config.image_size`.
            targets: The objects: a pair of `loss`'s gt_boxes and gt_labels, or for each image a dict with "boxes",
                float [n, 4] xyxy in input pixels, and "labels", int64 [n] in [0, num_classes).

        Returns:
            Class logits [B, A * num_classes, H_l, W_l] and box deltas [B, A * 4, H_l, W_l] of all levels, finest first; or
            what `loss` returns.

        Raises:
            TypeError: The targets are neither form, or as for `loss`.
            ValueError: The images have another shape, or as for `loss`.
        """
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, *self.config.image_size):
            height, width = self.config.image_size
            raise ValueError(
                f"DetectionModel: images must have shape [B, 3, {height}, {width}] (config.image_size), "
                f"got {list(images.shape)}"
            )
        # torch.jit.trace cannot record our operators; of the references it records PyTorch's.
        with use_reference() if torch.jit.is_tracing() else nullcontext():
            levels = self.fpn(self.backbone(images))
            outputs = self.class_net(levels), self.box_net(levels)
        return outputs if targets is None else self.loss(outputs, *padded_targets(targets))

    @torch.no_grad()
    def predict(self, images: torch.Tensor) -> Detections:
        """Detect objects on normalized images, with the configuration's thresholds.

        Nothing waits for the device. `Detector.predict` does the same for files and pictures.

        Args:
            images: As for `forward`.

        Returns:
            `Detections`, as from `detect`; boxes are clipped to the input.

        Raises:
            RuntimeError: The model is in training mode, where BatchNorms and drop path would give other detections.
        """
        if self.training:
            raise RuntimeError("DetectionModel.predict: the model is in training mode; call eval() first")
        height, width = (images.new_full((len(images), 1), side, dtype=torch.float32) for side in images.shape[2:])
        return self.detect(self(images), clip_sizes=torch.cat([height, width], dim=1))

    def anchors(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Return the anchors, float32 [N, 4] xyxy in input pixels, in the order of the outputs.

        Args:
            device: Where to return them; None takes the model's device.
        """
        target = next(self.parameters()).device if device is None else torch.device(device)
        return self._anchors.boxes(target)

    def assign(self, gt_boxes: torch.Tensor, gt_labels: torch.Tensor) -> AnchorTargets:
        """Assign the objects of a batch to anchors by the configuration's rules; see `effdet_fast.ops.match_anchors`.

        Args:
            gt_boxes: As for `loss`.
            gt_labels: As for `loss`.

        Returns:
            `AnchorTargets`: what the heads should say at each anchor.
        """
        config = self.config
        return match_anchors(
            self._anchors.boxes(gt_boxes.device),
            gt_boxes,
            gt_labels,
            pos_iou=config.pos_iou,
            neg_iou=config.neg_iou,
            force_match=config.force_match,
            allow_low_quality_matches=config.allow_low_quality_matches,
            box_coder=config.box_coder,
        )

    def loss(self, outputs: Outputs, gt_boxes: torch.Tensor, gt_labels: torch.Tensor) -> DetectionLoss:
        """Compute the training loss of `forward`'s outputs.

        Anchors are matched on the device; nothing waits for it.

        Args:
            outputs: What `forward` returned.
            gt_boxes: float [B, M, 4] xyxy in input pixels.
            gt_labels: int64 [B, M], class in [0, num_classes), -1 in padding rows. An image may have only padding
                rows, and M may be 0.

        Returns:
            `DetectionLoss(total, cls, box)`, float32 scalars.

        Raises:
            TypeError: Labels are not int64 or boxes not floating.
            ValueError: Wrong shapes, or (checked on the CPU; on a GPU after `effdet_fast.set_debug(True)`) a label that is no
                class or an object's box that is not finite or turned inside out, naming image and box. An object whose box
                has no area takes no part.
        """
        config = self.config
        cls_outputs, box_outputs = self._check_outputs(outputs, "DetectionModel.loss")
        check_objects(gt_boxes, gt_labels, cls_outputs[0].shape[0], config.num_classes)
        targets = self.assign(gt_boxes, gt_labels)
        return detection_loss(
            cls_outputs,
            box_outputs,
            targets.labels,
            targets.boxes,
            targets.num_positives,
            num_classes=config.num_classes,
            alpha=config.focal_alpha,
            gamma=config.focal_gamma,
            delta=config.box_loss_delta,
            box_loss_weight=config.box_loss_weight,
            label_smoothing=config.label_smoothing,
            box_loss=config.box_loss,
            normalizer=config.loss_normalizer,
            anchors=self._anchors.boxes(gt_boxes.device),
            box_coder=config.box_coder,
        )

    def detect(
        self,
        outputs: Outputs,
        *,
        score_threshold: float | None = None,
        iou_threshold: float | None = None,
        max_detections: int | None = None,
        clip_sizes: torch.Tensor | None = None,
    ) -> Detections:
        """Turn `forward`'s outputs into detections.

        The best `config.max_candidates` scores of an image go through per-class non-maximum suppression.

        Args:
            outputs: What `forward` returned.
            score_threshold: Lower scores are dropped; None takes the configuration's.
            iou_threshold: NMS suppresses above this IoU; None takes the configuration's.
            max_detections: Rows per image; None takes the configuration's.
            clip_sizes: float [B, 2] (height, width) in input pixels that boxes are clipped to before NMS, for instance
                the part of a letterboxed input that shows the image; None does not clip. A box that lies outside, and so has
                no area, is no detection.

        Returns:
            `Detections(boxes [B, K, 4], scores [B, K], labels [B, K], indices [B, K], counts [B])`: boxes xyxy in input
            pixels, labels 0-based, by descending score; rows past `counts` are padding. `indices` are rows of `anchors()`.

        Raises:
            TypeError: An option is not a number.
            ValueError: Shapes do not fit, or an option is out of range.
        """
        config = self.config
        cls_outputs, box_outputs = self._check_outputs(outputs, "DetectionModel.detect")
        batch = cls_outputs[0].shape[0]
        if clip_sizes is not None and tuple(clip_sizes.shape) != (batch, 2):
            raise ValueError(
                f"DetectionModel.detect: clip_sizes must have shape [{batch}, 2], got {list(clip_sizes.shape)}"
            )
        return decode_detections(
            cls_outputs,
            box_outputs,
            self._anchors.boxes(cls_outputs[0].device),
            num_classes=config.num_classes,
            max_candidates=config.max_candidates,
            score_threshold=config.score_threshold if score_threshold is None else score_threshold,
            iou_threshold=config.nms_iou if iou_threshold is None else iou_threshold,
            max_detections=config.max_detections if max_detections is None else max_detections,
            clip_sizes=clip_sizes,
            box_coder=config.box_coder,
            candidates_per_level=config.candidates_per_level,
            drop_empty=True,
        )

    def _check_outputs(self, outputs: Outputs, caller: str) -> Outputs:
        cls_outputs, box_outputs = outputs
        per_cell = self.config.anchors_per_cell
        for what, levels, values in (("class", cls_outputs, self.config.num_classes), ("box", box_outputs, 4)):
            expected = [(per_cell * values, height, width) for height, width in self._anchors.sizes]
            got = [tuple(level.shape[1:]) for level in levels]
            if got != expected:
                raise ValueError(
                    f"{caller}: {what} outputs must have shapes [B, *shape] with shape in {expected}, got {got}"
                )
        return cls_outputs, box_outputs
