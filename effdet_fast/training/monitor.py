"""Watches a run's losses without making the host wait for the device at every step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from effdet_fast.training.distributed import Processes

_VALUES = 4  # total, class and box loss, norm of the gradient


class NonFiniteLoss(RuntimeError):
    """The error that ends a run when its loss, or outside fp16 its gradient, is no longer finite.

    With fp16 a non-finite gradient only lowers the loss scale; 50 of them in a row raise this error too. The step was skipped.

    Args:
        step: Step it happened in, counted from 0 over the whole run.
        image_ids: Image ids of that step's batch, from all processes in which it happened.
        losses: (total, class, box) loss in the first of these processes.
        what: "loss" or "gradient".
    """

    def __init__(self, step: int, image_ids: list[int | str], losses: tuple[float, float, float], what: str) -> None:
        self.step = step
        self.what = what
        self.image_ids = image_ids
        self.losses = losses
        total, cls, box = losses
        super().__init__(
            f"non-finite {what} in step {step}: loss {total:g} (class {cls:g}, box {box:g}), image ids {image_ids}; "
            "that step was skipped"
        )

    def tell_of_weights(self, model: nn.Module) -> None:
        """Add to the message whether the weights of the model are still finite."""
        tensors = [x for x in (*model.parameters(), *model.buffers()) if x.is_floating_point()]
        told = ", so the weights are still finite"
        if not all(bool(x.isfinite().all()) for x in tensors):
            started = "look at the checkpoint or the learning rate it started from"
            told = f", but the model holds numbers that are not finite: {started}"
        self.args = (f"{self}{told}",)


@dataclasses.dataclass
class LossSums:
    """Sums of the losses of an epoch's finite steps; checkpoints hold them, so that a resumed epoch reports the same means."""

    steps: int = 0
    total: float = 0.0
    cls: float = 0.0
    box: float = 0.0

    def means(self) -> tuple[float, float, float]:
        count = max(1, self.steps)
        return self.total / count, self.cls / count, self.box / count


class LossMonitor:
    """Collects the losses of `window` steps on the device and reads them all at once, one step after the last.

    Args:
        device: Where the losses are computed.
        processes: The processes of the run; they all raise NonFiniteLoss at the same step.
        window: Steps between two reads.
        scaled: Whether a gradient scaler is at work: then a non-finite gradient means "lower the scale", and only a
            non-finite loss, or nothing but non-finite gradients for `patience` steps, is an error.
        patience: See `scaled`.
        own_id: The id that an image has in its annotations file, from that in a batch.
    """

    def __init__(
        self,
        device: torch.device,
        processes: Processes,
        *,
        window: int = 20,
        scaled: bool = False,
        patience: int = 50,
        own_id: Callable[[int], int | str] = lambda image_id: image_id,
    ) -> None:
        self.sums = LossSums()
        self.latest = math.nan
        self._window = window
        self._processes = processes
        self._scaled = scaled
        self._patience = patience
        self._own_id = own_id
        self._overflows = 0
        self.skipped: list[int] = []  # steps of the run that the scaler skipped
        self._device = device
        self._values = torch.zeros(window, _VALUES, device=device)
        self._host = torch.zeros(window, _VALUES, pin_memory=device.type == "cuda")
        self._collected: list[tuple[int, Tensor]] = []
        self._reading: list[tuple[int, Tensor]] = []
        self._copied: torch.cuda.Event | None = None

    def record(self, step: int, losses: tuple[Tensor, Tensor, Tensor], norm: Tensor, image_ids: Tensor) -> None:
        """Note one step; never waits for it.

        Args:
            step: Index over the whole run.
            losses: 0-d device tensors: total, class, box.
            norm: 0-d device tensor, the norm of the gradient.
            image_ids: int64 [B] on the host.
        """
        self._finish_read()
        row = self._values[len(self._collected)]
        torch.stack([value.detach().float() for value in (*losses, norm)], out=row)
        self._collected.append((step, image_ids))
        if len(self._collected) == self._window:
            self._start_read()

    def flush(self) -> None:
        """Read everything recorded so far, waiting for the device.

        Raises:
            NonFiniteLoss: On every process, if any of them recorded a non-finite step.
        """
        self._finish_read()
        self._start_read()
        self._finish_read()

    def steps_taken(self, step: int) -> int:
        """Of the first `step` steps those that moved the weights. Skipped ones are read late, and count from the second window
        behind `step` on, so that a resumed run counts them as an uninterrupted one does."""
        known = (step // self._window - 1) * self._window
        return step - sum(skipped < known for skipped in self.skipped)

    def start_epoch(self, sums: LossSums | None = None) -> None:
        self.sums = sums or LossSums()

    def _start_read(self) -> None:
        self._reading, self._collected = self._collected, []
        self._host.copy_(self._values, non_blocking=True)
        if self._device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record()

    def _finish_read(self) -> None:
        if not self._reading:
            return
        if self._copied is not None:
            self._copied.synchronize()
        steps, self._reading = self._reading, []
        failure = self._read_rows(steps)
        self._raise_together(failure)

    def _read_rows(self, steps: list[tuple[int, Tensor]]) -> NonFiniteLoss | None:
        for (step, image_ids), (total, cls, box, norm) in zip(steps, self._host.tolist(), strict=False):
            if not math.isfinite(total + cls + box):
                return NonFiniteLoss(step, self._own_ids(image_ids), (total, cls, box), "loss")
            self.sums.steps += 1  # also of a step that the scaler skips, as its loss is right
            self.sums.total += total
            self.sums.cls += cls
            self.sums.box += box
            self.latest = total
            if math.isfinite(norm):
                self._overflows = 0
                continue
            self._overflows += 1
            self.skipped.append(step)
            if not self._scaled or self._overflows >= self._patience:
                return NonFiniteLoss(step, self._own_ids(image_ids), (total, cls, box), "gradient")
        return None

    def _own_ids(self, image_ids: Tensor) -> list[int | str]:
        return list(map(self._own_id, image_ids.tolist()))

    def _raise_together(self, failure: NonFiniteLoss | None) -> None:
        """Every process reads after the same step, so they can exchange what they found there."""
        found = [other for other in self._processes.gather(_fields(failure)) if other is not None]
        if not found:
            return
        losses_first = sorted(found, key=lambda fields: (fields[0], fields[3] != "loss"))
        step, _, losses, what = losses_first[0]
        image_ids = [i for fields in found if (fields[0], fields[3]) == (step, what) for i in fields[1]]
        raise NonFiniteLoss(step, image_ids, losses, what)


def _fields(failure: NonFiniteLoss | None) -> tuple[int, list[int | str], tuple[float, float, float], str] | None:
    if failure is None:
        return None
    return failure.step, failure.image_ids, failure.losses, failure.what
