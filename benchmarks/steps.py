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

OK, FAILED, OUT_OF_TIME, NOT_REACHED = "ok", "FAILED", "OUT OF TIME", "NOT REACHED"
SKIPPED, REFUSED = "skipped", "refused"
GOOD = (OK, SKIPPED, REFUSED)
GRACE_SECONDS = 5.0  # for what is interrupted to write what it has
LONGEST = 2  # times its budget: what hangs leaves the rest of the time to others


@dataclass(frozen=True)
class Step:
    """A command; `{limit}` in an argument becomes the seconds it has.

    `budget` is set aside for it. What earlier steps left of theirs is added, up to `LONGEST` times the budget, and what they took
    beyond theirs is missing at the end. `needs` names steps that must have succeeded; `skip` is a reason not to run it at all. A
    `probe` asks whether something works here at all: if not, that is no failure, and what needs it is skipped. A command that
    ends by a signal, or with another status than 0 and 1, is run again while `tries` last.
    """

    name: str
    command: list[str]
    budget: float  # seconds
    environment: dict[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    skip: str | None = None
    probe: bool = False
    tries: int = 1
    output_lines: int = 3  # how many of its last lines the summary shows


@dataclass(frozen=True)
class Result:
    name: str
    status: str
    seconds: float
    detail: str  # the last lines of its output, or why it did not run

    @property
    def good(self) -> bool:
        return self.status in GOOD


def run_all(
    steps: list[Step],
    end: float,
    log: TextIO | None = None,
    after_each: Callable[[list[Result]], None] = lambda results: None,
) -> list[Result]:
    """Runs the steps until `end` on the monotonic clock; `after_each` is called with the results so far."""
    results: dict[str, Result] = {}
    for i, step in enumerate(steps):
        set_aside = sum(later.budget for later in steps[i + 1 :] if _may_run(later, results))
        missing = [results[name] for name in step.needs if results[name].status != OK]
        names = ", ".join(result.name for result in missing)
        left = end - time.monotonic()
        if step.skip:
            result = Result(step.name, SKIPPED, 0.0, step.skip)
        elif missing:
            failures = [each.status for each in missing if not each.good]
            status = FAILED if FAILED in failures else NOT_REACHED if failures else SKIPPED
            result = Result(step.name, status, 0.0, f"not run: it needs {names}")
        elif left <= GRACE_SECONDS:
            result = Result(step.name, NOT_REACHED, 0.0, "no time left")
        else:
            left -= GRACE_SECONDS
            result = run(step, min(left, max(step.budget, min(left - set_aside, LONGEST * step.budget))), log)
        results[step.name] = result
        after_each(list(results.values()))
    return list(results.values())


def _may_run(step: Step, results: dict[str, Result]) -> bool:
    """As far as one knows by now."""
    return not step.skip and all(results[name].status == OK for name in step.needs if name in results)


def run(step: Step, limit: float, log: TextIO | None = None) -> Result:
    """Runs a step's command, again where it crashed and may; shows and logs its output."""
    start = time.monotonic()
    for left in reversed(range(step.tries)):
        seconds = limit - (time.monotonic() - start)
        status, code, lines = _run_once(step, seconds, log)
        if not left or code in (0, 1, None) or limit - (time.monotonic() - start) < 1:
            break
        _tell(f"== {step.name} {_ended(code)}: again\n", log)
    if code not in (0, 1, None):
        lines.append(_ended(code))
    if step.probe and status == FAILED:
        status = REFUSED
    return Result(step.name, status, time.monotonic() - start, "\n".join(lines))


def _run_once(step: Step, limit: float, log: TextIO | None) -> tuple[str, int | None, list[str]]:
    """Status, exit status (None where there is none), last lines. Ends the command and all it started when the limit is over."""
    command = [argument.replace("{limit}", f"{limit:.0f}") for argument in step.command]
    _tell(f"== {step.name} (at most {limit:.0f} s): {' '.join(command)}\n", log)
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
        return FAILED, None, [str(error)]
    tail: deque[str] = deque(maxlen=step.output_lines)
    reader = threading.Thread(target=_forward, args=(process.stdout, tail, log), daemon=True)
    reader.start()
    code: int | None = None
    try:
        code = process.wait(limit)
        status = OK if code == 0 else FAILED
    except subprocess.TimeoutExpired:
        status = OUT_OF_TIME
    _end(process)
    reader.join(GRACE_SECONDS / 5)
    return status, code, list(tail)


def _ended(code: int) -> str:
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"


def _heed_interrupts() -> None:
    """In the command: a shell's background jobs ignore interrupts, and what they start would too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end(process: subprocess.Popen) -> None:
    """Interrupts the command's process group, so that it can still write what it has, then kills what is left of it."""
    for number, seconds in ((signal.SIGINT, 0.6 * GRACE_SECONDS), (signal.SIGKILL, 0.2 * GRACE_SECONDS)):
        if number == signal.SIGINT and process.poll() is not None:
            continue  # it ended by itself
        try:
            os.killpg(process.pid, number)
            process.wait(seconds)
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
