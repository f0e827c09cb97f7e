"""Optimizer, learning rate, moving average, and the skip of steps with non-finite gradients."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Decay for convolution weights only: biases, BatchNorm and edge weights are vectors or scalars and get none."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("train: every parameter is frozen, so there is nothing to train")
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def create_optimizer(
    model: nn.Module, *, name: str, lr: float, weight_decay: float, momentum: float = 0.9
) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum ("sgd") or AdamW ("adamw"), in their fused forms.

    The fused forms take a device-side flag that skips the step (`set_skip_flag`), so a bad batch costs no host
    synchronization.
    """
    groups = parameter_groups(model, weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=True)
    if name != "sgd":
        raise ValueError(f"train: optimizer must be one of sgd, adamw, got {name!r}")
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=True, fused=True)
    # The fused kernel allocates the momentum without filling it and returns early when the very first step is
    # skipped, which is the rule with fp16; zeros give the same first step and cannot be garbage.
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give all groups the learning rate, rounded to float32: what a tensor of it holds, so that both give the same bits."""
    rounded = float(np.float32(lr))
    for group in optimizer.param_groups:
        group["lr"] = rounded


class DeviceLearningRates:
    """The learning rates of an optimizer's groups as float32 scalars on a device, where a CUDA graph reads them.

    Args:
        optimizer: A fused or capturable one. Its groups hold these tensors from now on; schedulers of PyTorch write into
            them. A float32 tensor on the device that a group already holds stays.
        device: Of its parameters.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._optimizer, self._device = optimizer, device
        self._rates: list[Tensor] = []
        self.take_over()

    def take_over(self) -> None:
        """Bring what was put into the groups since then (``group["lr"] = x``, ``load_state_dict``) to the device."""
        for i, group in enumerate(self._optimizer.param_groups):
            given = group["lr"]
            if i == len(self._rates):
                fits = isinstance(given, Tensor) and (given.device, given.dtype) == (self._device, torch.float32)
                self._rates.append(given if fits else torch.zeros((), device=self._device))
            if given is not self._rates[i]:
                self._rates[i].fill_(given)
                group["lr"] = self._rates[i]


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer takes a skip flag: the fused ones do, as ``torch.amp.GradScaler`` asks them to."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def why_not_capturable(optimizer: torch.optim.Optimizer) -> str | None:
    """Why a CUDA graph cannot hold the steps of an optimizer; None if it can."""
    for group in optimizer.param_groups:
        if not (group.get("fused") or group.get("capturable")):
            ways = " or ".join(f"{flag}=True" for flag in ("fused", "capturable") if flag in group)
            name = type(optimizer).__name__
            return f"{name} reads its learning rate on the host" + (f" unless made with {ways}" if ways else "")
    return None


@contextlib.contextmanager
def marked_capturable(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Tell a fused Adam or AdamW that it is being captured, which it refuses otherwise; its step is the same.

    Not said for good, as it would then warn at each step that is not captured.
    """
    groups = [group for group in optimizer.param_groups if "capturable" in group]
    before = [group["capturable"] for group in groups]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group, value in zip(groups, before, strict=True):
            group["capturable"] = value


def set_skip_flag(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """Make the next steps do nothing where `skip`, a 0-d float tensor on the parameters' device, is 1."""
    optimizer.found_inf = skip  # type: ignore[attr-defined]


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients to a total norm of at most `max_norm` (0: leave them) and return the norm before, 0-d."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


@dataclasses.dataclass(frozen=True)
class WarmupCosine:
    """The learning rate by step: linear warm-up, then a half cosine down to 0. A resumed run needs the step alone.

    Args:
        peak: Learning rate at the end of warm-up.
        warmup_steps: Steps of linear warm-up: step 0 uses ``peak / warmup_steps``.
        total_steps: Steps of the whole run; the rate would reach zero at this step, which is never taken.
    """

    peak: float
    warmup_steps: int
    total_steps: int

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


class ModelEma:
    """An exponential moving average of a model's parameters.

    The decay of update t is ``min(decay, (1 + t) / (10 + t))``, so that initial weights do not dominate short runs. Buffers, such
    as BatchNorm's statistics, are copied, as they are averages already. An update takes a few fused passes over the parameters,
    and the host does not wait for it.

    Args:
        model: The model to follow.
        decay: Largest decay, in (0, 1).

    Attributes:
        module: A copy of the model with the averaged weights, in evaluation mode.
        updates: Number of updates.

    Example:
        ```python
        ema = ModelEma(model, decay=0.9998)
        for images, gt_boxes, gt_labels in batches:
            optimizer.zero_grad()
            model(images, (gt_boxes, gt_labels)).total.backward()
            optimizer.step()
            ema.update()
        ema.copy_buffers()  # before ema.module is used
        ```
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self._averages: list[Tensor] = list(self.module.parameters())
        self._parameters: list[Tensor] = list(model.parameters())
        self._share = torch.zeros((), device=self._parameters[0].device)
        self._buffer_pairs = list(zip(self.module.buffers(), model.buffers(), strict=True))

    def update(self) -> None:
        """Move the averages towards the parameters; call once after each optimizer step."""
        self.count_update()
        self.move()

    def count_update(self) -> None:
        """Do the part of `update` that depends on the number of updates: put the share of the new weights on the device."""
        self.updates += 1
        self._share.fill_(1.0 - min(self.decay, (1 + self.updates) / (10 + self.updates)))

    @torch.no_grad()
    def move(self) -> None:
        """Do the other part of `update`, which is always the same, so that a CUDA graph can hold it."""
        steps = torch._foreach_sub(self._parameters, self._averages)
        torch._foreach_mul_(steps, self._share)
        torch._foreach_add_(self._averages, steps)

    @torch.no_grad()
    def copy_buffers(self) -> None:
        """Copy the model's buffers; call it before evaluating or saving `module`."""
        for average, source in self._buffer_pairs:
            average.copy_(source)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state dict of `module`, with the buffers copied first."""
        self.copy_buffers()
        return self.module.state_dict()

    def load(self, state_dict: dict[str, Tensor], updates: int) -> None:
        """Load averaged weights.

        Args:
            state_dict: What `state_dict` returned.
            updates: Number of updates they have had.
        """
        self.module.load_state_dict(state_dict)
        self.updates = updates
