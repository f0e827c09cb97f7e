"""What a `last.pt` holds beside the detector: all that a resumed run continues from."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, NamedTuple

from effdet_fast.checkpoints.format import read_checkpoint


@dataclasses.dataclass
class RunState:
    """The `training` part of a `last.pt`, as plain values that load with ``weights_only=True``.

    Fields with a default are missing in files of earlier versions.

    Attributes:
        config: The run's options.
        epoch, batch, step: Finished epochs, finished batches of the epoch under way, finished steps.
        images_per_step: Of all processes together.
        data: A row per training image; see `record_data`. Earlier versions wrote a line of text.
        model, optimizer, scaler: State dicts. The published weights are the averaged ones.
        ema_updates: How often those were brought up to date.
        sums: Of the losses of the epoch under way.
        rows: Of `results.csv`.
        best: The best AP.
        metrics: Of the last evaluation.
        skipped: Steps that the gradient scaler left out.
        steps_per_epoch: For whoever reads the file.
    """

    config: dict[str, Any]
    epoch: int
    batch: int
    step: int
    images_per_step: int
    data: Any
    model: dict[str, Any]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    ema_updates: int
    sums: dict[str, float]
    rows: list[dict[str, Any]]
    best: float
    metrics: dict[str, float]
    skipped: list[int] = dataclasses.field(default_factory=list)
    steps_per_epoch: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The fields as they are, no copies."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


class RunCheckpoint(NamedTuple):
    """A `last.pt`: the published dictionary (see `checkpoints.format`) and the state of its run."""

    published: dict[str, Any]
    state: RunState


def read_run_checkpoint(path: str | os.PathLike[str]) -> RunCheckpoint:
    """Read a `last.pt`, tensors on the CPU.

    Raises:
        FileNotFoundError: No such file.
        ValueError: No checkpoint; or a `best.pt`, which has no state, or a state that is not whole.
    """
    content = read_checkpoint(path)
    if "training" not in content:
        raise ValueError(f"{path} holds weights only and cannot be resumed; resume from the run's last.pt")
    state = content["training"]
    fields = dataclasses.fields(RunState)
    needed = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
    missing = [name for name in needed if not isinstance(state, dict) or name not in state]
    if missing:
        raise ValueError(f"{path} cannot be resumed: it has no {', '.join(missing)}")
    return RunCheckpoint(content, RunState(**{f.name: state[f.name] for f in fields if f.name in state}))
