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
NO_GPU = "GPU: not yet run on a GPU."
NO_CPU = "CPU: not yet run."


def generate(everything: list[Record]) -> str:
    """The text between the markers: a table per device, GPUs first."""
    parts = []
    for device_type, missing in (("cuda", NO_GPU), ("cpu", NO_CPU)):
        slugs = dict.fromkeys(record.device_slug for record in everything if record.device_type == device_type)
        parts += [device_section(records.newest_rows(everything, slug)) for slug in slugs] or [missing]
    return "\n\n".join(parts)


def device_section(by_op: dict[str, tuple[Record, list[Row]]]) -> str:
    newest = max((record for record, _ in by_op.values()), key=lambda record: record.date)
    versions = newest.environment["versions"]
    cuda = f", CUDA {versions['cuda']}" if newest.device_type == "cuda" else ""
    commits = sorted({commit_text(record) for record, _ in by_op.values()})
    lines = [
        f"**{newest.environment['device']['name']}** ({newest.date[:10]}, PyTorch {versions['torch']}{cuda}, "
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
    cells = [row.op, row.case, f"{row.dtype}, {row.layout}", "forward + backward" if row.phase == "both" else row.phase]
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


def with_table(readme: str, table: str) -> str:
    """The README's text with `table` between the markers."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"README: must have exactly one {BEGIN} and one {END}")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where the README differs")
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--results", type=Path, default=records.RESULTS)
    options = parser.parse_args(arguments)
    text = options.readme.read_text()
    wanted = with_table(text, generate(records.load_all(options.results)))
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
