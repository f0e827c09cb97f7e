"""How much memory a training step takes on a CPU, whoever allocates it: the growth of a process of its own."""

import multiprocessing
import sys
from pathlib import Path

import torch

from benchmarks.workload import Case

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes(case: Case, dtype: torch.dtype, layout: str, name: str) -> int | None:
    """Most memory resident in the second step of an implementation, beyond that before the first; None where it cannot be told.

    A new process, as one that has run steps keeps memory for the next. `case.build` must be picklable.
    """
    if sys.platform != "linux":
        return None
    threads = torch.get_num_threads()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_grown, (case, dtype, layout, name, threads))


def _grown(case: Case, dtype: torch.dtype, layout: str, name: str, threads: int) -> int:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    workload = case.build(torch.device("cpu"), dtype, layout)
    (implementation,) = (each for each in (workload.ours, *workload.peers) if each.name == name)
    assert implementation.step is not None
    before = _kilobytes("VmRSS")
    implementation.step()
    CLEAR_REFS.write_text("5")  # the peak begins anew
    implementation.step()
    return (_kilobytes("VmHWM") - before) * 1024


def _kilobytes(field: str) -> int:
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
