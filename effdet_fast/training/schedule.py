"""The learning rate at a step: linear warm-up, then a half cosine down to zero."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class WarmupCosine:
    """A function of the step alone, so resuming needs nothing but the step.

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
