"""What a run leaves behind: raw figures per case and phase, in a JSON file that is never overwritten."""

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1
RESULTS = Path(__file__).parent / "results"
OURS = "effdet_fast"
LARGE = 4_000_000  # bytes


@dataclass(frozen=True)
class Timing:
    """Seconds: median, 20 % and 80 % quantile over the rounds."""

    median: float
    q20: float
    q80: float
    rounds: int
    error: float | None = None  # relative error of the results against the oracle
    peak_bytes: int | None = None  # None where it is not measured (on a CPU all but training steps)
    first: float | None = None  # the first step of a process, compiling included; None where it is not measured

    @staticmethod
    def of(
        samples: list[float],
        error: float | None = None,
        peak_bytes: int | None = None,
        first: float | None = None,
    ) -> "Timing":
        q20, q80 = quantile(samples, 0.2), quantile(samples, 0.8)
        return Timing(statistics.median(samples), q20, q80, len(samples), error, peak_bytes, first)


@dataclass(frozen=True)
class Profile:
    """What the profiler saw of one step: see `step_profile`."""

    launches: int  # of kernels on a GPU, operator calls on a CPU
    seconds: dict[str, float]  # by family of operations


@dataclass(frozen=True)
class Row:
    """One phase of one case: who took how long, and who could not take part.

    Names that begin with `OURS` run on this package's operators; all others are peers.
    """

    op: str
    case: str
    dtype: str
    layout: str
    phase: str
    bytes: int  # the fewest that must be moved
    copy: Timing | None = None  # a copy of as many bytes, in the same rounds
    timings: dict[str, Timing] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)  # implementation -> wrong result, error, or why it is absent
    images: int | None = None  # in a training step
    profiles: dict[str, Profile] = field(default_factory=dict)
    tf32: bool | None = None  # whether cuDNN's convolutions rounded float32 to TF32; None where there are none
    tuned: bool = False  # whether all took part in processes that called `effdet_fast.tune_cpu()`

    @property
    def precision(self) -> str:
        return precision(self.dtype, self.tf32)

    @property
    def setting(self) -> str:
        """The precision, and how the process was tuned."""
        return self.precision + (", after tune_cpu()" if self.tuned else "")

    @property
    def name(self) -> str:
        """Of what was measured, in all of its phases."""
        return case_name(self.op, self.case, self.dtype, self.layout, self.tf32)

    @property
    def is_large(self) -> bool:
        """Whether it moves enough for a share of a copy to mean something."""
        return self.bytes >= LARGE

    @property
    def ours(self) -> Timing | None:
        return self.timings.get(OURS)

    @property
    def peers(self) -> list[tuple[str, Timing]]:
        """The fastest first."""
        peers = [(name, timing) for name, timing in self.timings.items() if not name.startswith(OURS)]
        return sorted(peers, key=lambda peer: peer[1].median)

    @property
    def best_peer(self) -> tuple[str, Timing] | None:
        return self.peers[0] if self.peers else None

    @property
    def speed_up(self) -> float | None:
        """Time of the fastest peer over ours."""
        return self.best_peer[1].median / self.ours.median if self.ours and self.best_peer else None

    def gigabytes_per_second(self, timing: Timing) -> float:
        return self.bytes / timing.median / 1e9

    def copy_percent(self, timing: Timing) -> float | None:
        return 100 * self.copy.median / timing.median if self.copy else None


def precision(dtype: str, tf32: bool | None) -> str:
    return dtype if tf32 is None else f"{dtype} {'with' if tf32 else 'without'} TF32"


def case_name(op: str, case: str, dtype: str, layout: str, tf32: bool | None) -> str:
    return f"{op}, {case}, {precision(dtype, tf32)}, {layout}"


@dataclass
class Record:
    """All rows measured on one device, what they were measured with (`environment.describe`), and what is missing and why."""

    environment: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)  # name of a case -> why it does not have all of its rows

    @property
    def device_type(self) -> str:
        return self.environment["device"]["type"]

    @property
    def cpu_level(self) -> str | None:
        """The vectors that the CPU kernels used: processors of one name may differ in them. None of a GPU's record."""
        return self.environment.get("build", {}).get("cpu_level") if self.device_type == "cpu" else None

    @property
    def device_name(self) -> str:
        return self.environment["device"]["name"] + (f", {self.cpu_level}" if self.cpu_level else "")

    @property
    def device_slug(self) -> str:
        return self.environment["device"]["slug"] + (f"-{self.cpu_level}" if self.cpu_level else "")

    @property
    def date(self) -> str:
        return self.environment["date"]


def quantile(samples: list[float], q: float) -> float:
    """Linear interpolation between the ordered samples."""
    ordered = sorted(samples)
    position = q * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def to_json(record: Record) -> str:
    rows = [asdict(row) for row in record.rows]
    content = {"format": FORMAT, "environment": record.environment, "rows": rows, "missing": record.missing}
    return json.dumps(content, indent=1) + "\n"


def from_json(text: str) -> Record:
    data = json.loads(text)
    if data.get("format") != FORMAT:
        raise ValueError(f"benchmark record: format must be {FORMAT}, got {data.get('format')!r}")
    rows = []
    for row in data["rows"]:
        copy = Timing(**row.pop("copy")) if row["copy"] else row.pop("copy")
        timings = {name: Timing(**timing) for name, timing in row.pop("timings").items()}
        profiles = {name: Profile(**profile) for name, profile in row.pop("profiles", {}).items()}
        rows.append(Row(**row, copy=copy, timings=timings, profiles=profiles))
    return Record(data["environment"], rows, data.get("missing", {}))


def new_file(folder: Path, record: Record) -> Path:
    """Creates and returns a file of the record's device and date that did not exist before."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{record.device_slug}-{record.date[:10]}"
    number = 1
    while True:
        path = folder / (f"{stem}.json" if number == 1 else f"{stem}-{number}.json")
        try:
            path.touch(exist_ok=False)
            return path
        except FileExistsError:
            number += 1


def load_all(folder: Path = RESULTS) -> list[Record]:
    """Records of a folder, oldest first."""
    records = [from_json(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return sorted(records, key=lambda record: record.date)


def shown(rows: list[Row]) -> list[Row]:
    """For tables and pictures: forward alone, and forward with backward. The backward alone stays in the record."""
    return [row for row in rows if row.phase != "backward"]


def newest_rows(records: list[Record], device_slug: str) -> dict[str, tuple[Record, list[Row]]]:
    """For each op the newest record of the device that has it, with that op's rows."""
    newest: dict[str, tuple[Record, list[Row]]] = {}
    for record in records:
        if record.device_slug == device_slug:
            for op in dict.fromkeys(row.op for row in record.rows):
                newest[op] = (record, [row for row in record.rows if row.op == op])
    return newest
