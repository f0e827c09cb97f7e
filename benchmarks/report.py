"""Writes the README's table of measurements from the newest records of each device."""

import argparse
import difflib
import sys
from pathlib import Path

from benchmarks import records
from benchmarks.records import Record, Row
from benchmarks.table import milliseconds

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
STEP_BEGIN, STEP_END = "<!-- training-step:begin -->", "<!-- training-step:end -->"
NO_GPU = "GPU: not yet run on a GPU."
NO_CPU = "CPU: not yet run."
STEP_OP = "training_step"


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
        f"| | images/s | step | against {first} | peak memory | {calls} |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, timing in sorted(row.timings.items(), key=lambda item: -item[1].median):
        profile = row.profiles.get(name)
        cells = [
            name,
            f"{(row.images or 1) / timing.median:.2f}",
            milliseconds(timing.median),
            f"{row.timings[first].median / timing.median:.2f}x",
            f"{timing.peak_bytes / 1e6:.0f} MB" if timing.peak_bytes else "",
            f"{profile.launches}" if profile else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [f"| {name} | {problem} | | | | |" for name, problem in row.problems.items()]
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


def with_table(readme: str, table: str, begin: str = BEGIN, end: str = END) -> str:
    """The README's text with `table` between the markers."""
    if readme.count(begin) != 1 or readme.count(end) != 1:
        raise ValueError(f"README: must have exactly one {begin} and one {end}")
    before, rest = readme.split(begin)
    return f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"


def updated(readme: str, everything: list[Record]) -> str:
    """The README's text with both of its generated parts."""
    readme = with_table(readme, generate(everything))
    return with_table(readme, generate_steps(everything), STEP_BEGIN, STEP_END)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where the README differs")
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--results", type=Path, default=records.RESULTS)
    options = parser.parse_args(arguments)
    text = options.readme.read_text()
    wanted = updated(text, records.load_all(options.results))
    if not options.check:
        options.readme.write_text(wanted)
        return 0
    difference = difflib.unified_diff(
        text.splitlines(), wanted.splitlines(), str(options.readme), "generated", lineterm=""
    )
    print("\n".join(difference) or f"{options.readme}: up to date")
    return int(text != wanted)


if __name__ == "__main__":
    sys.exit(main())
