"""What a run leaves in its output folder, and when it may write there."""

from __future__ import annotations

import csv
import errno
import os
import re
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows, where runs are not kept apart
    fcntl = None  # type: ignore[assignment]

from effdet_fast.evaluation import METRICS
from effdet_fast.files import write_atomically, write_json

COLUMNS = ("epoch", "step", "lr", "loss", "cls_loss", "box_loss", *METRICS, "images_per_second", "seconds")
LOCK = ".lock"
_HELD: set[Path] = set()  # folders of this process's runs
RUN_FILES = ("config.json", "results.csv", "best.pt", "last.pt", "failure.json")


# What `write_atomically` leaves if the process is killed in it.
_TEMPORARY = re.compile(rf"\.[0-9a-f]+\.({'|'.join(map(re.escape, RUN_FILES))})")


class RunFolder:
    """The folder of one run.

    Args:
        path: The folder; made by `claim`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: IO[str] | None = None

    @property
    def best(self) -> Path:
        return self.path / "best.pt"

    @property
    def last(self) -> Path:
        return self.path / "last.pt"

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def failure(self) -> Path:
        return self.path / "failure.json"

    def check_free(self, *, overwrite: bool, resumed_from: Path | None) -> None:
        """Make sure that a run may write here: no run is ever replaced unasked.

        Raises:
            ValueError: The folder holds a run, and neither `overwrite` nor a resume from that very folder was asked.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"output {self.path} exists and is not a folder")
        found = self._found()
        if found and not overwrite and not self._continues(resumed_from):
            resume = f"--resume {self.last} to continue it, " if self.last.exists() else ""
            raise ValueError(
                f"output {self.path} already holds a run ({', '.join(found)}): pass {resume}"
                "--overwrite to replace it, or another --output"
            )

    def claim(self, *, overwrite: bool, resumed_from: Path | None) -> None:
        """Make the folder, keep other runs out of it, and clear away what an earlier run left, unless this one continues it.

        Raises:
            ValueError: As `check_free`; or a run that is still going writes here.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        self.check_free(overwrite=overwrite, resumed_from=resumed_from)
        for entry in self.path.iterdir():
            if _TEMPORARY.fullmatch(entry.name):
                entry.unlink()
        if not self._continues(resumed_from):
            for name in self._found():
                (self.path / name).unlink()
        self.failure.unlink(missing_ok=True)

    def release(self) -> None:
        """Let other runs in again; the end of the process does so too."""
        if self._lock is not None:
            _HELD.discard(self.path.resolve())
            (self.path / LOCK).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None

    def _take_lock(self) -> None:
        if fcntl is None or self._lock is not None:
            return
        path = self.path / LOCK
        if self.path.resolve() in _HELD:  # the system keeps processes apart, not threads
            raise self._taken()
        while self._lock is None:
            lock = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")
            try:
                # Of the process, so that data-loading processes neither inherit nor keep it.
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.exists() and os.path.samestat(
                    os.fstat(lock.fileno()), path.stat()
                ):  # else its run has just ended
                    self._lock = lock
            except (BlockingIOError, PermissionError):
                raise self._taken() from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                path.unlink(missing_ok=True)
                return  # a file system without locks, where runs are not kept apart
            finally:
                if self._lock is None:
                    lock.close()
        _HELD.add(self.path.resolve())

    def _taken(self) -> ValueError:
        return ValueError(f"output {self.path} is being written by another run; choose another output")

    def _found(self) -> list[str]:
        return [name for name in RUN_FILES if (self.path / name).exists()]

    def _continues(self, resumed_from: Path | None) -> bool:
        return resumed_from is not None and self.path.resolve() == resumed_from.resolve().parent

    def write_failure(self, step: int, image_ids: list[int | str], message: str) -> None:
        """Write `failure.json`: where a run met its first non-finite loss."""
        failure = {"step": step, "image_ids": image_ids, "message": message}
        write_json(os.fspath(self.failure), failure, indent=2)

    def write_results(self, rows: list[dict[str, Any]]) -> None:
        """Write `results.csv` whole, one row per finished epoch, so a resumed run never repeats or loses a row."""

        def write(temporary: str) -> None:
            with open(temporary, "w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, restval="")
                writer.writeheader()
                writer.writerows(rows)

        write_atomically(os.fspath(self.path / "results.csv"), write)
