"""One training step, from a batch on the device to updated weights, without the host reading anything back."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from effdet_fast.device import AMP_MODES, autocast
from effdet_fast.training.optimizer import ModelEma, clip_gradients, set_skip_flag, skips_on_device


class StepLosses(NamedTuple):
    """The losses of a step: float32 scalars on the device, without a gradient.

    Attributes:
        total: Loss that the step went down.
        cls: Class loss.
        box: Box loss.
        grad_norm: Norm of the gradient over all parameters, before clipping.
    """

    total: Tensor
    cls: Tensor
    box: Tensor
    grad_norm: Tensor


class Losses(Protocol):
    """The result of a detector's loss: three scalars, of which `total` is differentiated."""

    @property
    def total(self) -> Tensor: ...
    @property
    def cls(self) -> Tensor: ...
    @property
    def box(self) -> Tensor: ...


class Detector(Protocol):
    """A module that a step can train: `DetectionModel`, or any with such a method `loss`."""

    def loss(self, outputs: Any, gt_boxes: Tensor, gt_labels: Tensor) -> Losses:
        """Compute the losses of the module's outputs for a batch; shapes are those of `TrainingStep.__call__`."""
        ...


class TrainingStep:
    """A training step, called with a batch: forward, loss, backward, gradient clipping, optimizer and moving average.

    A step with a non-finite loss or gradient leaves the weights as they are. This is decided on the device, by optimizers with
    ``fused=True`` and, with "fp16", by all. Another optimizer takes the step all the same.

    Args:
        model: A `DetectionModel`, or any module with ``loss(outputs, gt_boxes, gt_labels)``, on its device and in training mode;
            may be wrapped in ``DistributedDataParallel``.
        optimizer: Optimizer of the parameters of `model`.
        clip_grad_norm: Largest norm of the gradient over all trained parameters; 0 switches clipping off.
        ema: Moving average to update after each step.
        amp: "none" (float32), "bf16" or "fp16" (with a gradient scaler, the attribute `scaler`).

    Raises:
        TypeError: `model` has no method ``loss``, or `ema` is no ModelEma.
        ValueError: `clip_grad_norm` is negative, `amp` is unknown, or no parameter requires a gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip_grad_norm: float = 0.0,
        ema: ModelEma | None = None,
        amp: str = "none",
    ) -> None:
        name = type(self).__name__
        detector: Any = model.module if isinstance(model, DistributedDataParallel) else model
        if not callable(getattr(detector, "loss", None)):
            raise TypeError(
                f"{name}: model must have a method loss(outputs, gt_boxes, gt_labels), got {type(model).__name__}"
            )
        if not (ema is None or isinstance(ema, ModelEma)):
            raise TypeError(f"{name}: ema must be a ModelEma or None, got {type(ema).__name__}")
        if not clip_grad_norm >= 0:
            raise ValueError(f"{name}: clip_grad_norm must be at least 0, got {clip_grad_norm}")
        if amp not in AMP_MODES:
            raise ValueError(f"{name}: amp must be one of {', '.join(AMP_MODES)}, got {amp!r}")
        self.detector: Detector = detector
        self.model, self.optimizer, self.clip_grad_norm, self.ema, self.amp = model, optimizer, clip_grad_norm, ema, amp
        self.parameters = list(model.parameters())
        if not any(parameter.requires_grad for parameter in self.parameters):
            raise ValueError(f"{name}: model must have a parameter that requires a gradient")
        self.device = self.parameters[0].device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp == "fp16")

    def __call__(self, images: Tensor, gt_boxes: Tensor, gt_labels: Tensor) -> StepLosses:
        """Take one step; the host does not wait for it.

        Args:
            images: What the model takes, for instance float [B, 3, H, W].
            gt_boxes: float [B, M, 4] xyxy in input pixels.
            gt_labels: int64 [B, M]; -1 in padding rows.

        Returns:
            The `StepLosses`, on the device.
        """
        self.prepare()
        return self.compute(images, gt_boxes, gt_labels)

    def prepare(self) -> None:
        """Do the part of a step that depends on the number of steps taken."""
        if self.ema is not None:
            self.ema.count_update()

    def compute(self, images: Tensor, gt_boxes: Tensor, gt_labels: Tensor) -> StepLosses:
        """Do the rest of a step: kernel launches only, the same ones for each batch of these shapes.

        Args:
            images: As for a call.
            gt_boxes: As for a call.
            gt_labels: As for a call.

        Returns:
            The `StepLosses`, on the device.
        """
        self.drop_gradients()
        # Entered here, so that the weights it casts and keeps are those of this step and of nothing before it.
        with autocast(self.device, self.amp):
            losses = self.detector.loss(self.model(images), gt_boxes, gt_labels)
        # A non-finite loss turns every gradient into NaN, on every process once they are averaged, so that all of
        # them skip this step; decided on the device, without waiting for it.
        poison = torch.where(losses.total.detach().isfinite(), 1.0, math.nan)
        self.scaler.scale(losses.total * poison).backward()
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.parameters, self.clip_grad_norm)
        if not self.scaler.is_enabled() and skips_on_device(self.optimizer):  # the scaler sets the flag by itself
            set_skip_flag(self.optimizer, (~norm.isfinite()).float())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.drop_gradients()
        if self.ema is not None:
            self.ema.move()
        return StepLosses(*(value.detach().float() for value in (losses.total, losses.cls, losses.box, norm)))

    def drop_gradients(self) -> None:
        """Set the gradients of all parameters to None."""
        for parameter in self.parameters:
            parameter.grad = None
