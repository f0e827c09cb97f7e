"""What a run leaves in its output folder, and when it may write there."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

from effdet_fast.evaluation import METRICS
from effdet_fast.evaluation.result_files import write_atomically, write_json

COLUMNS = ("epoch", "step", "lr", "loss", "cls_loss", "box_loss", *METRICS, "images_per_second", "seconds")
RUN_FILES = ("config.json", "results.csv", "best.pt", "last.pt", "failure.json")


class RunFolder:
    """The folder of one run.

    Args:
        path: The folder; made by `claim`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

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

    def claim(self, *, resumed_from: Path | None) -> None:
        """Make the folder and clear away what an earlier run left, unless this one continues it."""
        if not self._continues(resumed_from):
            for name in self._found():
                (self.path / name).unlink()
        self.failure.unlink(missing_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)

    def _found(self) -> list[str]:
        return [name for name in RUN_FILES if (self.path / name).exists()]

    def _continues(self, resumed_from: Path | None) -> bool:
        return resumed_from is not None and self.path.resolve() == resumed_from.resolve().parent

    def write_failure(self, step: int, image_ids: list[int], message: str) -> None:
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
