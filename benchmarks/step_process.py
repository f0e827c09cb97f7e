"""Training steps on a CPU in a process of their own, as a training script has it.

What the C library does with freed memory depends on all that the process allocated before: beside other implementations a step
may find memory at hand for which, alone, the kernel clears pages in every step, or the other way round.
"""

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import effdet_fast
from benchmarks.records import Profile
from benchmarks.step_profile import profile_of
from benchmarks.workload import Case

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
WARMUP, PASSES = 3, 2


class Steps(NamedTuple):
    """Seconds of each step; most memory resident in them beyond that before the first, None where it cannot be told.

    `first_seconds` are those of a new process's first step, with nothing in the cache of torch.compile.
    """

    seconds: list[float]
    first_seconds: float
    peak_bytes: int | None
    profile: Profile


def measure_alone(
    case: Case, dtype: torch.dtype, layout: str, names: list[str], rounds: int
) -> dict[bool, dict[str, Steps]]:
    """Runs each implementation in new processes for `rounds` steps: as torch finds them, and after `effdet_fast.tune_cpu()`.

    All take turns, `PASSES` times, there and back again. `case.build` must be picklable.

    Returns:
        For False and for True (tuned) the steps of each implementation.
    """
    turns = [(tuned, name) for name in names for tuned in (False, True)]
    results: dict[bool, dict[str, Steps]] = {tuned: {} for tuned in (False, True)}
    first: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(PASSES):
            for tuned, name in turns if number % 2 == 0 else reversed(turns):
                cache = str(Path(folder) / str(names.index(name)))  # the compiler that it calls takes no spaces
                arguments = (case, dtype, layout, name, rounds, torch.get_num_threads(), tuned, cache)
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    steps = pool.apply(_steps, arguments)
                first.setdefault(name, steps.first_seconds)
                earlier = results[tuned].get(name)
                seconds = earlier.seconds + steps.seconds if earlier else steps.seconds
                results[tuned][name] = steps._replace(seconds=seconds, first_seconds=first[name])
    return results


def _steps(
    case: Case, dtype: torch.dtype, layout: str, name: str, rounds: int, threads: int, tuned: bool, cache: str
) -> Steps:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    if tuned:
        effdet_fast.tune_cpu()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    workload = case.build(torch.device("cpu"), dtype, layout)
    (implementation,) = (each for each in (workload.ours, *workload.peers) if each.name == name)
    step = implementation.step
    assert step is not None, f"{name} has no step"
    before = _resident("VmRSS")
    first_seconds = _seconds(step)
    for _ in range(WARMUP - 1):
        step()
    if before is not None:
        CLEAR_REFS.write_text("5")  # the peak begins anew
    seconds = [_seconds(step) for _ in range(rounds)]
    peak = _resident("VmHWM")
    grown = None if before is None or peak is None else peak - before
    return Steps(seconds, first_seconds, grown, profile_of(implementation, torch.device("cpu")))


def _seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _resident(field: str) -> int | None:
    """Bytes; None where there is no /proc."""
    if sys.platform != "linux":
        return None
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:")) * 1024
