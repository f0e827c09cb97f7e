"""Runs commands one after another, each within a time limit of its own and all within one altogether."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TextIO

OK, FAILED, OUT_OF_TIME, SKIPPED = "ok", "FAILED", "OUT OF TIME", "skipped"
GRACE_SECONDS = 3.0


@dataclass(frozen=True)
class Step:
    """A command; `{limit}` in an argument becomes the seconds it has.

    `needs` names steps that must have succeeded; `skip` is a reason not to run it at all. Steps that `share` get at most an equal
    part of the time that is left when they start.
    """

    name: str
    command: list[str]
    limit: float  # seconds
    environment: dict[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    skip: str | None = None
    share: bool = False
    output_lines: int = 3  # how many of its last lines the summary shows


@dataclass(frozen=True)
class Result:
    name: str
    status: str
    seconds: float
    detail: str  # the last lines of its output, or why it did not run

    @property
    def good(self) -> bool:
        return self.status in (OK, SKIPPED)


def run_all(
    steps: list[Step], limit: float, log: TextIO | None = None, now: Callable[[], float] = time.monotonic
) -> list[Result]:
    """Runs the steps for at most `limit` seconds in all. What a step needs and did not get, or time, skips it."""
    start = now()
    results: dict[str, Result] = {}
    for i, step in enumerate(steps):
        left = limit - (now() - start)
        if step.share:
            left /= sum(later.share for later in steps[i:])
        missing = [name for name in step.needs if results[name].status != OK]
        if step.skip:
            result = Result(step.name, SKIPPED, 0.0, step.skip)
        elif missing:
            result = Result(step.name, FAILED, 0.0, f"not run: it needs {', '.join(missing)}")
        elif left <= GRACE_SECONDS:
            result = Result(step.name, OUT_OF_TIME, 0.0, "not run: no time left")
        else:
            result = run(step, min(step.limit, left - GRACE_SECONDS), log)
        results[step.name] = result
    return list(results.values())


def run(step: Step, limit: float, log: TextIO | None = None) -> Result:
    """Runs one command, showing and logging its output; ends it and all it started when the limit is over."""
    command = [argument.replace("{limit}", f"{limit:.0f}") for argument in step.command]
    _tell(f"== {step.name} (at most {limit:.0f} s): {' '.join(command)}\n", log)
    start = time.monotonic()
    try:
        process = subprocess.Popen(
            command,
            env={**os.environ, **step.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=_heed_interrupts,
        )
    except OSError as error:
        return Result(step.name, FAILED, 0.0, str(error))
    tail: deque[str] = deque(maxlen=step.output_lines)
    reader = threading.Thread(target=_forward, args=(process.stdout, tail, log), daemon=True)
    reader.start()
    try:
        status = OK if process.wait(limit) == 0 else FAILED
    except subprocess.TimeoutExpired:
        status = OUT_OF_TIME
        _end(process)
    reader.join(GRACE_SECONDS)
    return Result(step.name, status, time.monotonic() - start, "\n".join(tail))


def _heed_interrupts() -> None:
    """In the command: a shell's background jobs ignore interrupts, and what they start would too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end(process: subprocess.Popen) -> None:
    """Interrupts the command's process group, so that it can still write what it has, then kills it."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE_SECONDS / 2)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def _forward(pipe, tail: deque[str], log: TextIO | None) -> None:
    for line in pipe:
        _tell(line, log)
        if line.strip():
            tail.append(line.rstrip())


def _tell(text: str, log: TextIO | None) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
    if log:
        log.write(text)
        log.flush()


def summary(results: list[Result]) -> str:
    lines = []
    for result in results:
        lines.append(f"{result.name:24} {result.status:12} {result.seconds:6.1f} s")
        lines += [f"    {line[:160]}" for line in result.detail.splitlines()]
    return "\n".join(lines)
