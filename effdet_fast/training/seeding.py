"""Where a run's random numbers come from, and which algorithms PyTorch may choose."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

_MASK = 2**64 - 1


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed PyTorch's generators for one step of one process.

    The random numbers of a step (stochastic depth, dropout) are thus a function of (seed, step, rank) alone: neither an
    evaluation in between nor an interruption changes them, and no generator state has to be saved.
    """
    torch.manual_seed(_mix(_mix(_mix(seed) ^ step) ^ rank))


def _mix(value: int) -> int:
    """SplitMix64's finaliser: neighboring inputs give unrelated seeds."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


@contextlib.contextmanager
def algorithm_choice(deterministic: bool) -> Iterator[None]:
    """Prefer deterministic algorithms (or the fastest ones), and put the caller's choice back at the end."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        torch.random.get_rng_state(),
    )
    if deterministic:
        # cuBLAS reads this when its first handle is made; without it matrix products may differ between runs.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]  # type: ignore[attr-defined]
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before[3], before[4]
        torch.random.set_rng_state(before[5])
