"""The exponential moving average of a model's weights, which is what gets evaluated and published."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class ModelEma:
    """Moving average of the parameters of `model`; buffers (BatchNorm statistics) are copied, being averages already.

    The decay of update t is ``min(decay, (1 + t) / (10 + t))``, so that short runs are not dominated by their initial
    weights. A few fused passes over the parameters per step, no host synchronisation.

    Args:
        model: The model to follow; `module` is a copy of it in evaluation mode.
        decay: Largest decay, in (0, 1).
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
        """Move the averages towards the parameters; call once after each optimiser step."""
        self.count_update()
        self.move()

    def count_update(self) -> None:
        """The part of `update` that knows how many there have been: put the share of the new weights on the device."""
        self.updates += 1
        self._share.fill_(1.0 - min(self.decay, (1 + self.updates) / (10 + self.updates)))

    @torch.no_grad()
    def move(self) -> None:
        """The other part, which is the same each time and so can lie in a CUDA graph."""
        steps = torch._foreach_sub(self._parameters, self._averages)
        torch._foreach_mul_(steps, self._share)
        torch._foreach_add_(self._averages, steps)

    @torch.no_grad()
    def copy_buffers(self) -> None:
        """Bring the buffers up to date; call before evaluating or saving `module`."""
        for average, source in self._buffer_pairs:
            average.copy_(source)

    def state_dict(self) -> dict[str, Tensor]:
        self.copy_buffers()
        return self.module.state_dict()

    def load(self, state_dict: dict[str, Tensor], updates: int) -> None:
        self.module.load_state_dict(state_dict)
        self.updates = updates
