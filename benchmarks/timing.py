"""Times functions that take turns, so that drift of the machine hits all of them alike."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

MAX_ROUNDS = 200
LEAST_FLUSHED = 256 << 20  # bytes


@dataclass(frozen=True)
class Task:
    """`run(prepare())` with only `run` timed. `captured_after` as of an `Implementation`."""

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None
    captured_after: int | None = None


class CpuClock:
    """Each run follows one of the same task, as in a loop: it finds the memory and caches that it left itself.

    After another task it may meet pages that a virtual machine has handed back to its host, and wait for those only.
    """

    device = torch.device("cpu")

    def seconds(self, task: Task) -> float:
        task.run(task.prepare())
        prepared = task.prepare()
        start = time.perf_counter()
        task.run(prepared)
        return time.perf_counter() - start

    def peak_bytes(self, task: Task) -> int | None:
        """Not measured: the CPU allocator of PyTorch keeps no count."""
        return None


class CudaClock:
    """Events around the run, with the L2 cache overwritten before it.

    The overwriting keeps the GPU busy while the host enqueues the run, so launch costs of the host show only where a run
    needs more host time than that.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush_buffer = torch.empty(max(2 * l2_bytes, LEAST_FLUSHED), dtype=torch.int8, device=device)

    def seconds(self, task: Task) -> float:
        prepared = task.prepare()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush_buffer.zero_()
        start.record()
        task.run(prepared)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def peak_bytes(self, task: Task) -> int | None:
        """Most memory allocated at once during the run, beyond what was allocated before it; and what a CUDA graph keeps."""
        kept = 0 if task.captured_after is None else graphs_bytes(self.device)
        prepared = task.prepare()
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        task.run(prepared)
        torch.cuda.synchronize(self.device)
        return kept + torch.cuda.max_memory_allocated(self.device) - before


def graphs_bytes(device: torch.device) -> int:
    """Memory that the CUDA graphs captured so far have set aside, in pools of their own."""
    segments = torch.cuda.memory_snapshot()
    own_pools = (s for s in segments if s["device"] == (device.index or 0) and tuple(s["segment_pool_id"]) != (0, 0))
    return sum(segment["total_size"] for segment in own_pools)


def clock_for(device: torch.device) -> CpuClock | CudaClock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def interleaved(
    tasks: dict[str, Task], clock: CpuClock | CudaClock, seconds: float, min_rounds: int = 5
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Times every task in turn for about `seconds` altogether and at least `min_rounds` times each.

    Each round has an order of its own (the same ones in every run): after a task that reads the same tensors, caches hold more.

    Returns:
        Seconds of each task that ran to the end, and why the others failed.
    """
    failures: dict[str, str] = {}

    def time_one(name: str) -> float:
        try:
            return clock.seconds(tasks[name])
        except Exception as error:  # one that fails must not cost the others
            failures[name] = failure(error)
            return 0.0

    for name, task in tasks.items():
        for _ in range(1 + (task.captured_after or 0)):
            time_one(name)
    estimate = sum(time_one(name) for name in tasks if name not in failures)
    rounds = min(MAX_ROUNDS, max(min_rounds, int(seconds / max(estimate, 1e-9))))
    names = list(tasks)
    samples: dict[str, list[float]] = {name: [] for name in names}
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(names)
        for name in names:
            if name not in failures:
                samples[name].append(time_one(name))
    return {name: times for name, times in samples.items() if name not in failures}, failures


def failure(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]


def copy_task(num_bytes: int, device: torch.device) -> Task:
    """A copy that reads half of the bytes and writes the other half; random data, since zeros can move faster."""
    source = torch.empty(max(num_bytes // 2, 1), dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return Task(lambda _: target.copy_(source))
