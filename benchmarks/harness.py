"""Measures one case: checks every implementation, then times those that are right, taking turns."""

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.correctness import WrongResultError, as_tuple, check, evaluate, upstream_gradients
from benchmarks.records import Profile, Row, Timing
from benchmarks.step_process import measure_alone
from benchmarks.step_profile import profile_of
from benchmarks.timing import CpuClock, CudaClock, Task, clock_for, copy_task, failure, interleaved
from benchmarks.workload import BACKWARD, FORWARD, OURS, STEP, Case, Implementation, Workload
from effdet_fast.diagnostics import convolutions

COPY = "copy"


def measure(
    op: str,
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    layout: str,
    *,
    seconds: float = 1.0,
    min_rounds: int = 5,
    phases: tuple[str, ...] | None = None,
    peers: tuple[str, ...] | None = None,
    compiled_peers: bool = True,
    tf32: bool | None = None,
) -> Iterator[Row]:
    """Yields a row per phase; for training steps on a CPU two, the second with `effdet_fast.tune_cpu()`.

    Args:
        seconds: aimed at per phase, for all implementations together.
        min_rounds: how often each implementation runs at least, however slow.
        phases: the ones wanted; None for all that the case has.
        peers: names of the peers wanted; None for all.
        compiled_peers: whether those that torch.compile made are among them.
        tf32: whether cuDNN's convolutions round float32 to TF32 in what is timed, never in what is checked; None as it is.
    """
    torch.manual_seed(0)
    torch._dynamo.reset()  # each case is compiled for its own shapes, and must not run into the recompilation limit
    workload = case.build(device, dtype, layout)
    workload.peers = [
        peer
        for peer in workload.peers
        if (peers is None or peer.name in peers) and (compiled_peers or not peer.compiles)
    ]
    with convolutions(tf32=False):
        upstream, errors, problems = passing(workload, dtype)
    right = [i for i in (workload.ours, *workload.peers) if i.name in errors]
    release(device)
    clock = clock_for(device)
    for phase in workload.phases:
        if phases is None or phase in phases:
            dtype_name = str(dtype).removeprefix("torch.")
            row = Row(
                op,
                case.name,
                dtype_name,
                layout,
                phase,
                workload.bytes[phase],
                problems=problems,
                images=workload.images,
                tf32=tf32,
            )
            if OURS not in errors:
                yield row
                continue
            if phase == STEP and device.type == "cpu":
                yield from _steps_alone(row, case, dtype, layout, errors, min_rounds)
                continue
            with contextlib.nullcontext() if tf32 is None else convolutions(tf32):
                tasks = {i.name: task_of(i, phase, upstream) for i in right}
                row = timed(row, tasks, errors, clock, seconds, min_rounds)
                if phase == STEP:
                    row = profiled(row, [i for i in right if i.name in row.timings], device)
            yield row


def timed(
    row: Row,
    tasks: dict[str, Task],
    errors: dict[str, float],
    clock: CpuClock | CudaClock,
    seconds: float,
    min_rounds: int,
) -> Row:
    copy = copy_task(row.bytes, clock.device)
    samples, failures = interleaved({**tasks, COPY: copy}, clock, seconds, min_rounds)
    if OURS in failures:
        samples.clear()
    of_copy = samples.pop(COPY, None)
    timings = {}
    for name, times in samples.items():
        try:
            timings[name] = Timing.of(times, errors[name], clock.peak_bytes(tasks[name]))
        except Exception as error:
            failures[name] = failure(error)
    timing_of_copy = Timing.of(of_copy) if of_copy else None
    return replace(row, copy=timing_of_copy, timings=timings, problems={**row.problems, **failures})


def profiled(row: Row, implementations: list[Implementation], device: torch.device) -> Row:
    profiles: dict[str, Profile] = {}
    problems = dict(row.problems)
    for each in implementations:
        try:
            profiles[each.name] = profile_of(each, device)
        except Exception as error:  # not every machine lets its GPU be profiled
            problems[f"{each.name}, under the profiler"] = failure(error)
    return replace(row, profiles=profiles, problems=problems)


def _steps_alone(
    row: Row, case: Case, dtype: torch.dtype, layout: str, errors: dict[str, float], min_rounds: int
) -> Iterator[Row]:
    for tuned, alone in measure_alone(case, dtype, layout, list(errors), min_rounds).items():
        timings = {
            name: Timing.of(steps.seconds, errors[name], steps.peak_bytes, steps.first_seconds)
            for name, steps in alone.items()
        }
        profiles = {name: steps.profile for name, steps in alone.items()}
        yield replace(row, timings=timings, profiles=profiles, tuned=tuned)


def passing(
    workload: Workload, dtype: torch.dtype
) -> tuple[tuple[torch.Tensor, ...] | None, dict[str, float], dict[str, str]]:
    """Upstream gradients in use, the error of each implementation that is right, and what keeps the others out."""
    upstream = None
    if workload.oracle.leaves:
        outputs = as_tuple(workload.oracle.forward())
        if any(output.dim() for output in outputs):
            upstream = tuple(torch.randn_like(output, dtype=torch.float32).to(dtype) for output in outputs)
        del outputs
    expected = evaluate(workload.oracle, upstream)
    errors: dict[str, float] = {}
    problems = dict(workload.absent)
    for implementation in (workload.ours, *workload.peers):
        is_peer = implementation is not workload.ours
        compared = workload.results_of_peers if is_peer else None
        try:
            errors[implementation.name] = check(
                implementation, expected, upstream, dtype, is_peer, compared, workload.gradient_tolerance
            )
        except WrongResultError as error:
            problems[implementation.name] = f"wrong result: {error}"
        except Exception as error:  # a peer may fail in any way; the others are still worth timing
            problems[implementation.name] = failure(error)
    return upstream, errors, problems


def task_of(implementation: Implementation, phase: str, upstream: tuple[torch.Tensor, ...] | None) -> Task:
    """Forward runs without autograd; backward gets a fresh graph each time, built outside the timed part."""

    def forward_only(_):
        with torch.no_grad():
            return implementation.forward()

    def graph():
        outputs = as_tuple(implementation.forward())
        return outputs, upstream_gradients(outputs, upstream)

    def backward(prepared):
        return torch.autograd.grad(prepared[0], implementation.leaves, prepared[1])

    if phase == STEP:
        step = implementation.step
        assert step is not None, f"{implementation.name} has no step"
        return Task(lambda _: step(), captured_after=implementation.captured_after)
    if phase == FORWARD:
        return Task(forward_only)
    if phase == BACKWARD:
        return Task(backward, graph)
    with torch.enable_grad():
        gradients = graph()[1]
    return Task(lambda _: torch.autograd.grad(as_tuple(implementation.forward()), implementation.leaves, gradients))


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
