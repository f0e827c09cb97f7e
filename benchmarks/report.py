"""Writes docs/benchmarks.md, and the one table of the README, from the newest records of each device."""

import argparse
import difflib
import sys
from pathlib import Path

from benchmarks import records
from benchmarks.records import Record, Row, Timing
from benchmarks.table import between, milliseconds

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
NO_GPU = "GPU: not yet run on a GPU."
NO_CPU = "CPU: not yet run."
STEP_OP = "training_step"
SLOW_START = 20  # seconds
HEAD = """# Benchmarks

Every figure here was measured by `python -m benchmarks` and lies in a record in `benchmarks/results/`;
`python -m benchmarks.report` wrote this page from them. Each time is a median over rounds in which all implementations take
turns; what computes something else than the float64 oracle is not timed. "Of a copy" compares with copying as many bytes as
the operator must move at the least. To repeat: `python -m benchmarks focal_loss nms`, or all of it without a name;
`python -m benchmarks --help` tells how to choose cases, dtypes and devices. Timings of two runs differ by some percent, of two
machines by more: compare figures of one table only.

`python -m benchmarks.kernels` predicts the speed of the CUDA kernels from their machine code, `python -m benchmarks.overhead`
shows what calling an operator costs beside its work. [How the kernels work](kernels/index.md) has a page per operator.

## Training steps

Forward, labels, loss, backward and SGD; on a CPU each implementation in a process of its own, with memory as PyTorch leaves it,
and after `effdet_fast.tune_cpu()`. "effdet_fast on effdet" is effdet's model after `effdet_fast.accelerate`. Where a case
measures `accelerate` itself, the row "effdet_fast" is the accelerated model. The first step is that of a new process, in which
`torch.compile` finds an empty cache.

"""


def page(everything: list[Record]) -> str:
    """docs/benchmarks.md."""
    return f"{HEAD}{generate_steps(everything)}\n\n## Operators\n\n{generate(everything)}\n"


def generate_best(everything: list[Record]) -> str:
    """The README's table: of each op the geometry that gains most, and the training steps, on the device with most ops."""
    by_device = {r.device_slug: records.newest_rows(everything, r.device_slug) for r in everything}
    of_ops = max(by_device.values(), key=lambda by_op: len(_without_steps(by_op)), default={})
    newest_steps = max(
        (r for r in everything if any(row.op == STEP_OP for row in r.rows)), key=lambda r: r.date, default=None
    )
    lines = ["| | ours | peer | speed-up | all geometries |", "| --- | --- | --- | --- | --- |"]
    for op, (_, rows) in sorted(_without_steps(of_ops).items()):
        compared = [row for row in records.shown(rows) if row.speed_up]
        if compared:
            best = max(compared, key=lambda row: (row.phase == "both", row.speed_up))
            gains = sorted(row.speed_up or 0 for row in compared if row.phase == best.phase)
            phase = "" if best.phase == "forward" else ", with backward"
            lines.append(_best_row(f"{op}: {best.case}{phase}", best, f"{gains[0]:.2f}x to {gains[-1]:.2f}x"))
    for row in newest_steps.rows if newest_steps else []:
        if row.op == STEP_OP and row.phase == "step" and row.speed_up:
            lines.append(_best_row(f"training step: {row.case}{', after tune_cpu()' if row.tuned else ''}", row, ""))
    used = {f"{record.device_name} ({record.date[:10]})": None for record, _ in _without_steps(of_ops).values()}
    where = f"Operators: {', '.join(used)}."
    if newest_steps:
        where += f" Training steps: {newest_steps.device_name} ({newest_steps.date[:10]})."
    gpu = [] if any(record.device_type == "cuda" for record in everything) else [NO_GPU]
    return "\n".join([*lines, "", " ".join([where, *gpu])])


def _best_row(what: str, row: Row, others: str) -> str:
    """The best peer; of a training step all, as with `torch.compile` the first step is a price."""
    assert row.ours and row.best_peer
    peers = row.peers if row.op == STEP_OP else row.peers[:1]
    cells = [what, milliseconds(row.ours.median), ", ".join(map(_peer, peers)), f"{row.speed_up:.2f}x", others]
    return "| " + " | ".join(cells) + " |"


def _peer(peer: tuple[str, Timing]) -> str:
    name, timing = peer
    compiling = f", first step {timing.first:.0f} s" if timing.first and timing.first > SLOW_START else ""
    return f"{milliseconds(timing.median)} ({name}{compiling})"


def generate(everything: list[Record]) -> str:
    """The text between the markers: a table per device, GPUs first."""
    parts = []
    for device_type, missing in (("cuda", NO_GPU), ("cpu", NO_CPU)):
        slugs = dict.fromkeys(record.device_slug for record in everything if record.device_type == device_type)
        devices = [_without_steps(records.newest_rows(everything, slug)) for slug in slugs]
        parts += [device_section(by_op) for by_op in devices if by_op] or [missing]
    return "\n\n".join(parts)


def _without_steps(by_op: dict[str, tuple[Record, list[Row]]]) -> dict[str, tuple[Record, list[Row]]]:
    """Training steps have tables of their own."""
    return {op: found for op, found in by_op.items() if op != STEP_OP}


def device_section(by_op: dict[str, tuple[Record, list[Row]]]) -> str:
    newest = max((record for record, _ in by_op.values()), key=lambda record: record.date)
    versions = newest.environment["versions"]
    cuda = f", CUDA {versions['cuda']}" if newest.device_type == "cuda" else ""
    commits = sorted({commit_text(record) for record, _ in by_op.values()})
    lines = [
        f"**{newest.device_name}** ({newest.date[:10]}, PyTorch {versions['torch']}{cuda}, "
        f"commit {', '.join(commits)})",
        "",
        "| op | case | dtype, layout | phase | ours | of a copy | best peer | speed-up |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [table_row(row) for _, rows in by_op.values() for row in records.shown(rows)]
    return "\n".join(lines)


def commit_text(record: Record) -> str:
    commit = record.environment["commit"]
    changed = " with changes" if record.environment["uncommitted_changes"] else ""
    return f"{commit[:10]}{changed}" if commit else "unknown"


def table_row(row: Row) -> str:
    cells = [
        row.op,
        row.case,
        f"{row.precision}, {row.layout}",
        "forward + backward" if row.phase == "both" else row.phase,
    ]
    if not row.ours:
        return "| " + " | ".join([*cells, row.problems.get(records.OURS, "not measured"), "", "", ""]) + " |"
    percent = row.copy_percent(row.ours) if row.is_large else None
    cells += [milliseconds(row.ours.median), f"{percent:.0f} %" if percent is not None else ""]
    cells += (
        [f"{milliseconds(row.best_peer[1].median)} ({row.best_peer[0]})", f"{row.speed_up:.2f}x"]
        if row.best_peer
        else ["", ""]
    )
    return "| " + " | ".join(cells) + " |"


def generate_steps(everything: list[Record]) -> str:
    """Training steps, for each device and model: a table of all who took part, and one of where their time goes."""
    parts = [] if any(record.device_type == "cuda" for record in everything) else [NO_GPU]
    for slug in dict.fromkeys(record.device_slug for record in everything):
        record, rows = records.newest_rows(everything, slug).get(STEP_OP, (None, []))
        if record:
            versions = ", ".join(f"{name} {record.environment['versions'].get(name)}" for name in ("torch", "effdet"))
            for row in (row for row in rows if row.phase == "step"):
                where = f"{record.device_name}, {record.date[:10]}, {versions}, {commit_text(record)}"
                parts += [f"**{row.case}, {row.setting}** ({where})", step_table(row, record)]
                parts += [family_table(row)] if row.profiles else []
    return "\n\n".join(parts)


def step_table(row: Row, record: Record) -> str:
    """Who took how long: those on our operators first, each against the first peer."""
    if not row.ours:
        return f"Not timed: {row.problems.get(records.OURS, 'not measured')}"
    calls = "kernel launches" if record.device_type == "cuda" else "operator calls"
    first = next((name for name in row.timings if not name.startswith(records.OURS)), records.OURS)
    lines = [
        f"| | images/s | step | against {first} | first step | peak memory | {calls} |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, timing in sorted(row.timings.items(), key=lambda item: -item[1].median):
        profile = row.profiles.get(name)
        cells = [
            name,
            f"{(row.images or 1) / timing.median:.2f}",
            milliseconds(timing.median),
            f"{row.timings[first].median / timing.median:.2f}x",
            f"{timing.first:.0f} s" if timing.first else "",
            f"{timing.peak_bytes / 1e6:.0f} MB" if timing.peak_bytes else "",
            f"{profile.launches}" if profile else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [f"| {name} | {problem} | | | | | |" for name, problem in row.problems.items()]
    return "\n".join(lines)


def family_table(row: Row) -> str:
    """Milliseconds under the profiler by family of operations; code generated by torch.compile is a family of its own."""
    names = list(row.profiles)
    families = list(dict.fromkeys(family for profile in row.profiles.values() for family in profile.seconds))
    lines = ["| ms, under the profiler | " + " | ".join(names) + " |", "| --- " * (len(names) + 1) + "|"]
    for family in families:
        times = [profile.seconds.get(family) for profile in row.profiles.values()]
        cells = [f"{1e3 * seconds:.0f}" if seconds is not None else "" for seconds in times]
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def with_table(readme: str, table: str) -> str:
    """The README's text with `table` between the markers."""
    return between("README", readme, BEGIN, END, table)


def written(everything: list[Record], root: Path = ROOT) -> dict[Path, str]:
    """The files that are made from records, and what must stand in them."""
    readme = root / "README.md"
    table = generate_best(everything)
    return {readme: with_table(readme.read_text(), table), root / "docs" / "benchmarks.md": page(everything)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a file differs")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md and docs/")
    parser.add_argument("--results", type=Path, default=records.RESULTS)
    options = parser.parse_args(arguments)
    differs = False
    for path, wanted in written(records.load_all(options.results), options.root).items():
        text = path.read_text() if path.exists() else ""
        differs |= text != wanted
        if not options.check:
            path.write_text(wanted)
            continue
        difference = difflib.unified_diff(text.splitlines(), wanted.splitlines(), str(path), "generated", lineterm="")
        print("\n".join(difference) or f"{path}: up to date")
    return int(options.check and differs)


if __name__ == "__main__":
    sys.exit(main())
