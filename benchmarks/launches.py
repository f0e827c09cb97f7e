"""What the operators launch on a GPU for the cases of their benchmarks, and the memory that the launches ask for: seen by the
emulation, which runs a few blocks of each. Needs g++, and no GPU."""

import importlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.unwritten import Unwritten
from benchmarks.workload import BACKWARD, FORWARD, Outputs
from tests.emulation.build import build
from tests.emulation.observation import Fits, Launch, observed

BLOCKS = 4  # of a launch that run
PEERS = ("effdet", "timm", "torchvision")


@dataclass(frozen=True)
class Call:
    """One phase of an operator. `x` and `y` are the bytes of all its inputs that are maps, and of its results."""

    op: str
    case: str
    phase: str
    launches: list[Launch]
    x: int
    y: int

    @property
    def has_prologue(self) -> bool:
        """Whether the operator applies an activation to its input first."""
        return "SiLU +" in self.case


def calls(
    op: str,
    dtype: torch.dtype,
    layout: str,
    case: str = "",
    blocks: int = 0,
    library: Path | None = None,
    fits: Fits | None = None,
) -> Iterator[Call]:
    """Forward, and backward where there is one, of the op's cases on a GPU whose names contain `case`. Some launches depend on
    how many blocks of their kernel fit on a multiprocessor."""
    for one in importlib.import_module(f"benchmarks.bench_{op}").cases("cuda"):
        if case not in one.name or layout not in one.layouts or dtype not in one.dtypes:
            continue
        with _without(PEERS), Unwritten():
            ours = one.build(torch.device("cpu"), dtype, layout).ours
            with observed(blocks, library, fits) as launches:
                results = _tensors(ours.forward())
            x, y = sum(map(_bytes, filter(_is_map, ours.leaves))), sum(map(_bytes, results))
            yield Call(op, one.name, FORWARD, launches, x, y)
            if ours.leaves:
                with observed(blocks, library, fits) as launches:
                    torch.autograd.grad(results, ours.leaves, [torch.empty_like(result) for result in results])
                yield Call(op, one.name, BACKWARD, launches, x, y)


def calls_with_requests(op: str, dtype: torch.dtype, layout: str, fits: Fits, case: str = "") -> Iterator[Call]:
    """The same from a library built for it, some of whose blocks run."""
    return calls(op, dtype, layout, case, BLOCKS, build(observe=True), fits)


@contextmanager
def _without(packages: Iterable[str]) -> Iterator[None]:
    """Inside, these cannot be imported, if they are not already: their imports take seconds, and want real tensors."""
    barred: dict[str, Any] = {package: None for package in packages if package not in sys.modules}
    sys.modules.update(barred)
    try:
        yield
    finally:
        for package in barred:
            del sys.modules[package]


def _tensors(outputs: Outputs) -> tuple[torch.Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _is_map(x: torch.Tensor) -> bool:
    """Not a filter: those have one or no channel of input per group, or no size."""
    return x.dim() == 4 and x.shape[1] > 1 and x.shape[-1] > 1


def _bytes(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()
