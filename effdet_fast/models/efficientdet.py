"""EfficientDet: backbone, BiFPN and heads, with its loss and post-processing."""

from __future__ import annotations

import torch
from torch import nn

from effdet_fast.models.anchors import AnchorCache
from effdet_fast.models.bifpn import BiFpn
from effdet_fast.models.config import EfficientDetConfig
from effdet_fast.models.efficientnet import EfficientNet
from effdet_fast.models.heads import PRIOR_PROBABILITY, Head
from effdet_fast.models.loss import DetectionLoss, detection_loss
from effdet_fast.models.postprocess import postprocess
from effdet_fast.ops import Detections, match_anchors

Outputs = tuple[list[torch.Tensor], list[torch.Tensor]]


class EfficientDet(nn.Module):
    """EfficientDet (arXiv:1911.09070) on the fused ops; state-dict keys are those of effdet's `tf_efficientdet_*`.

    In channels_last, every feature map stays channels_last: `model.to(memory_format=torch.channels_last)` and images
    in the same format is the fast way to run it.

    Args:
        config: What to build; `create_model` looks one up by name.
    """

    def __init__(self, config: EfficientDetConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = EfficientNet(config.backbone, config.drop_path_rate)
        self.fpn = BiFpn(self.backbone.feature_channels, config)
        self.class_net = Head(config.num_classes, config, prior=PRIOR_PROBABILITY)
        self.box_net = Head(4, config)
        self._anchors = AnchorCache(config)

    def forward(self, images: torch.Tensor) -> Outputs:
        """Raw head outputs of all levels, finest first.

        Args:
            images: float [B, 3, H, W], RGB, normalised with the configuration's mean and std; (H, W) is
                `config.image_size`.

        Returns:
            Class logits [B, A * num_classes, H_l, W_l] and box codes (ty, tx, th, tw) [B, A * 4, H_l, W_l] per level.

        Raises:
            ValueError: Wrong shape.
        """
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, *self.config.image_size):
            height, width = self.config.image_size
            raise ValueError(
                f"EfficientDet: images must have shape [B, 3, {height}, {width}] (config.image_size), "
                f"got {list(images.shape)}"
            )
        levels = self.fpn(self.backbone(images))
        return self.class_net(levels), self.box_net(levels)

    def anchors(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Anchors float32 [N, 4] xyxy in input pixels, ordered as the outputs; on the model's device by default."""
        target = next(self.parameters()).device if device is None else torch.device(device)
        return self._anchors.boxes(target)

    def loss(self, outputs: Outputs, gt_boxes: torch.Tensor, gt_labels: torch.Tensor) -> DetectionLoss:
        """Training loss of `forward`'s outputs. Labels are made on the device; nothing synchronises with the host.

        Args:
            outputs: What `forward` returned.
            gt_boxes: float [B, M, 4] xyxy in input pixels.
            gt_labels: int64 [B, M], class in [0, num_classes), -1 in padding rows. An image may have only padding
                rows, and M may be 0.

        Returns:
            `DetectionLoss(total, cls, box)`, float32 scalars.

        Raises:
            TypeError: Labels are not int64 or boxes not floating.
            ValueError: Wrong shapes, or (checked on the CPU) a label that is no class.
        """
        cls_outputs, box_outputs = self._check_outputs(outputs, "EfficientDet.loss")
        self._check_objects(gt_boxes, gt_labels, batch=cls_outputs[0].shape[0])
        anchors = self._anchors.boxes(cls_outputs[0].device)
        match_iou = self.config.match_iou
        targets = match_anchors(anchors, gt_boxes, gt_labels, pos_iou=match_iou, neg_iou=match_iou)
        return detection_loss(cls_outputs, box_outputs, targets, self.config)

    def detect(
        self,
        outputs: Outputs,
        *,
        score_threshold: float | None = None,
        iou_threshold: float = 0.5,
        max_detections: int = 100,
        clip_sizes: torch.Tensor | None = None,
    ) -> Detections:
        """Detections of a batch from `forward`'s outputs.

        The best 5000 (`config.max_candidates`) scores over all levels and classes go through per-class NMS.

        Args:
            outputs: What `forward` returned.
            score_threshold: Lower scores are dropped; None keeps all.
            iou_threshold: NMS suppresses above this IoU.
            max_detections: Rows per image.
            clip_sizes: float [B, 2] (height, width) in input pixels that boxes are clipped to before NMS, for instance
                the part of a letterboxed input that shows the image; None does not clip.

        Returns:
            `Detections(boxes [B, K, 4], scores [B, K], labels [B, K], indices [B, K], counts [B])`: boxes xyxy in input
            pixels, labels 0-based, by descending score; rows past `counts` are padding. `indices` are rows of `anchors()`.

        Raises:
            ValueError: Wrong shapes.
        """
        cls_outputs, box_outputs = self._check_outputs(outputs, "EfficientDet.detect")
        batch = cls_outputs[0].shape[0]
        if clip_sizes is not None and tuple(clip_sizes.shape) != (batch, 2):
            raise ValueError(
                f"EfficientDet.detect: clip_sizes must have shape [{batch}, 2], got {list(clip_sizes.shape)}"
            )
        return postprocess(
            cls_outputs,
            box_outputs,
            self._anchors.boxes(cls_outputs[0].device),
            self.config,
            score_threshold=score_threshold,
            iou_threshold=iou_threshold,
            max_detections=max_detections,
            clip_sizes=clip_sizes,
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

    def _check_objects(self, gt_boxes: torch.Tensor, gt_labels: torch.Tensor, batch: int) -> None:
        if gt_labels.dim() != 2 or gt_labels.shape[0] != batch:
            raise ValueError(f"EfficientDet.loss: gt_labels must have shape [{batch}, M], got {list(gt_labels.shape)}")
        expected = [*gt_labels.shape, 4]
        if list(gt_boxes.shape) != expected:
            raise ValueError(f"EfficientDet.loss: gt_boxes must have shape {expected}, got {list(gt_boxes.shape)}")
        if gt_labels.dtype != torch.int64:
            raise TypeError(f"EfficientDet.loss: gt_labels must be int64, got {gt_labels.dtype}")
        if not gt_boxes.is_floating_point():
            raise TypeError(f"EfficientDet.loss: gt_boxes must be floating point, got {gt_boxes.dtype}")
        if gt_labels.device.type == "cpu" and gt_labels.numel():
            highest = int(gt_labels.max())
            if highest >= self.config.num_classes:
                raise ValueError(
                    f"EfficientDet.loss: gt_labels must be below num_classes = {self.config.num_classes}, got {highest}"
                )
