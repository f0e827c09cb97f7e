"""Runs benchmarks, prints a table, writes a record and a picture per op. `build` instead of ops: times the extension's build."""

import argparse
import importlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import BENCHMARKS, build_times, environment, records
from benchmarks.harness import measure, release
from benchmarks.table import format_row
from benchmarks.workload import CHANNELS_LAST, CONTIGUOUS, PHASES, Case

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_DTYPES = {"cpu": ["float32"], "cuda": ["bfloat16", "float32"]}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    p.add_argument(
        "ops",
        nargs="*",
        choices=[[], *BENCHMARKS],
        metavar="OP",
        help=f"any of {', '.join(BENCHMARKS)}; all by default",
    )
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU, else cpu")
    p.add_argument(
        "--dtype", action="append", choices=DTYPES, help="repeatable; default float32, on a GPU also bfloat16"
    )
    p.add_argument("--layout", action="append", choices=(CONTIGUOUS, CHANNELS_LAST), help="repeatable; default all")
    p.add_argument("--phase", action="append", choices=PHASES, help="repeatable; default all")
    p.add_argument("--case", default="", help="only cases whose name contains this")
    p.add_argument(
        "--peers", nargs="*", metavar="NAME", help="only these peers (eager, torch.compile, torchvision, ...)"
    )
    p.add_argument("--quick", action="store_true", help="the first case of each op, in one dtype and layout, briefly")
    p.add_argument("--seconds", type=float, help="aimed at per measurement; default 1, with --quick 0.2")
    p.add_argument("--end-within", type=float, metavar="SECONDS", help="start no case that would not end by then")
    p.add_argument("--threads", type=int, help="CPU threads; default as PyTorch chooses")
    p.add_argument("--output", type=Path, default=records.RESULTS, help="folder for the record and the pictures")
    p.add_argument("--no-pictures", action="store_true")
    return p


def selected(arguments: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Case, torch.dtype, str]]:
    """Every (op, case, dtype, layout) wanted: the first case of each op first, so that a short budget sees all ops."""
    dtypes = [DTYPES[name] for name in arguments.dtype or DEFAULT_DTYPES[device.type]]
    per_op = []
    for op in arguments.ops or BENCHMARKS:
        combinations = [
            (op, case, dtype, layout)
            for case in importlib.import_module(f"benchmarks.bench_{op}").cases(device.type)
            for dtype in dtypes
            for layout in case.layouts
            if arguments.case in case.name
            and dtype in case.dtypes
            and (not arguments.layout or layout in arguments.layout)
        ]
        per_op.append(combinations[:1] if arguments.quick else combinations)
    for i in range(max(map(len, per_op), default=0)):
        yield from (combinations[i] for combinations in per_op if i < len(combinations))


def main(command_line: list[str] | None = None) -> int:
    command_line = sys.argv[1:] if command_line is None else command_line
    if command_line[:1] == ["build"]:
        return build_times.main(command_line[1:])
    p = parser()
    arguments = p.parse_args(command_line)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: PyTorch sees no GPU")
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if not (wanted := list(selected(arguments, device))):
        p.error("no case fits --case, --dtype and --layout")

    options = {
        "seconds": arguments.seconds or (0.2 if arguments.quick else 1.0),
        "min_rounds": 3 if arguments.quick else 5,
        "phases": tuple(arguments.phase) if arguments.phase else None,
        "peers": tuple(arguments.peers) if arguments.peers is not None else None,
    }
    start = time.monotonic()
    record = records.Record(environment.describe(device, command_line))
    path = records.new_file(arguments.output, record)
    save(record, path)
    print(f"{record.environment['device']['name']}, {len(wanted)} cases, record {path}\n", flush=True)
    try:
        run(wanted, device, record, path, start + (arguments.end_within or float("inf")), options)
    except KeyboardInterrupt:  # what has been measured is on disk
        print("Interrupted.")
        return 130
    if not arguments.no_pictures:
        draw(record, arguments.output)
    wrong = [row for row in record.rows if not row.ours]
    for row in wrong:
        print(f"NOT TIMED: {row.op}, {row.case}, {row.dtype} {row.layout}: {row.problems.get(records.OURS)}")
    print(f"{len(record.rows)} rows in {time.monotonic() - start:.0f} s: {path}")
    return 1 if wrong else 0


def run(wanted, device, record, path, end, options) -> None:
    longest = 0.0
    for done, (op, case, dtype, layout) in enumerate(wanted):
        start = time.monotonic()
        if start + longest > end:
            print(f"Out of time: {len(wanted) - done} of {len(wanted)} cases were not run.")
            return
        for row in measure(op, case, device, dtype, layout, **options):
            record.rows.append(row)
            save(record, path)
            print(format_row(row) + "\n", flush=True)
        release(device)
        longest = max(longest, time.monotonic() - start)


def save(record: records.Record, path: Path) -> None:
    """After every row, in one step, so that a run that is cut short leaves what it has measured."""
    unfinished = path.with_suffix(".part")
    unfinished.write_text(records.to_json(record))
    os.replace(unfinished, path)


def draw(record: records.Record, folder: Path) -> None:
    try:
        from benchmarks.pictures import draw_all
    except ImportError as error:
        print(f"No pictures: {error}")
        return
    for picture in draw_all(record, folder):
        print(picture)


if __name__ == "__main__":
    raise SystemExit(main())
