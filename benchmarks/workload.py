"""What a benchmark measures: cases, and for each case the implementations that compute the same thing."""

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

OURS = "effdet_fast"
FORWARD, BACKWARD, BOTH, STEP = "forward", "backward", "both", "step"
PHASES = (FORWARD, BACKWARD, BOTH, STEP)
CONTIGUOUS, CHANNELS_LAST = "contiguous", "channels_last"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Outputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Implementation:
    """One way to compute a case. `leaves` get gradients; they are listed in the same order by all that share a case.

    `step` is a whole training step on the same data, for the phase of that name; inside `scopes()` the profiler can tell the
    operators of a peer apart by the module they run in. A step that replays a CUDA graph captures it after as many others as
    `captured_after` says.
    """

    name: str
    forward: Callable[[], Outputs]
    leaves: tuple[Tensor, ...] = ()
    step: Callable[[], object] | None = None
    scopes: Callable[[], AbstractContextManager] = nullcontext
    captured_after: int | None = None

    @property
    def compiles(self) -> bool:
        return "compile" in self.name


@dataclass
class Workload:
    """A case with its data: ours, the peers, the oracle to check both with, and the fewest bytes each phase must move."""

    ours: Implementation
    oracle: Implementation
    bytes: dict[str, int]
    peers: list[Implementation] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)  # peers that cannot run here, and why
    results_of_peers: int | None = None  # how many of the results a peer must get right; None for all
    gradient_tolerance: float | None = None  # gradients are compared as one vector, as some are zero but for round-off
    images: int | None = None  # in a training step

    @property
    def phases(self) -> tuple[str, ...]:
        return tuple(phase for phase in PHASES if phase in self.bytes)


@dataclass(frozen=True)
class Case:
    """A named problem; `build` makes its data on a device, of a dtype, in a layout.

    `convolves`: somebody who takes part calls cuDNN's convolutions, which may round float32 to TF32.
    """

    name: str
    build: Callable[[torch.device, torch.dtype, str], Workload]
    layouts: tuple[str, ...] = (CONTIGUOUS,)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    convolves: bool = False


def compiled(function: Callable) -> Callable:
    """`torch.compile` for exactly these shapes. What it raises, it raises at the first call, where it is reported."""
    return torch.compile(function, dynamic=False)


def optional(name: str, absent: dict[str, str]) -> ModuleType | Any:
    """A peer's module, or None with the reason noted."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a peer built for another torch fails in its own ways
        absent[name.partition(".")[0]] = f"{type(error).__name__}: {error}"[:200]
        return None


def oracle_copy(x: Tensor) -> Tensor:
    """The same values in float64, as a leaf that gets a gradient."""
    return x.detach().double().requires_grad_()
