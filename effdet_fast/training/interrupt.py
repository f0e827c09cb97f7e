"""How Ctrl-C, SIGTERM and SIGHUP end a run: after the step in flight, by the same step on every process."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))


class Interrupt:
    """Remembers the first SIGINT, SIGTERM or SIGHUP; use as a context manager around the training loop.

    A second SIGINT gives up at once with KeyboardInterrupt, except under torchrun, whose agent passes on the SIGINT that
    the terminal has already sent to every process. Outside the main thread, where Python allows no handlers, it
    does nothing.
    """

    def __init__(self, *, launched: bool = False) -> None:
        self.signal: int | None = None
        self._launched = launched
        self._raise_at_once = False
        self._process = os.getpid()
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) is signal.SIG_IGN and number != signal.SIGINT:  # as nohup asks
                    continue
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked data-loading process: its parent decides when it ends
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        again = self.signal is not None and number == signal.SIGINT and not self._launched
        self.signal = self.signal or number
        if again or self._raise_at_once:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Raise KeyboardInterrupt at once inside the block: for work that is repeated on resume anyway."""
        self._raise_at_once = True
        try:
            if self.signal is not None:
                raise KeyboardInterrupt
            yield
        finally:
            self._raise_at_once = False


@contextlib.contextmanager
def ignoring_children() -> Iterator[None]:
    """Inside the block no end of a data-loading process raises, as PyTorch otherwise makes it do wherever the program is."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    try:
        before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    except RuntimeError:  # one that had ended already
        before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)
