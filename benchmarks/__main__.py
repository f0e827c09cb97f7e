"""Runs benchmarks, prints a table, writes a record and a picture per op. Instead of ops: `build` times
the extension's build, `contention` training steps beside busy processes."""

import argparse
import importlib
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import BENCHMARKS, START, build_times, contention, environment, records
from benchmarks.harness import measure, release
from benchmarks.table import format_row
from benchmarks.timing import failure
from benchmarks.workload import CHANNELS_LAST, CONTIGUOUS, DTYPES, PHASES, Case
from effdet_fast.files import write_atomically

# Why a case is missing from a record: what ended its process is not tried again when the record is gone on with.
CUT_SHORT, NOT_REACHED = "the process ended while it was measured", "no time was left"
DEVICE_LOST = 75  # exit status: after a fault no kernel of this process runs any more; another process can go on
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
    p.add_argument(
        "--compiled", choices=("all", "first"), default="all", help="cases whose peers run torch.compile too"
    )
    p.add_argument("--quick", action="store_true", help="the first case of each op, in one dtype and layout, briefly")
    p.add_argument("--seconds", type=float, help="aimed at per measurement; default 1, with --quick 0.2")
    p.add_argument(
        "--end-within",
        type=float,
        metavar="SECONDS",
        help="after the process began, no case is started that would not end by then",
    )
    p.add_argument("--threads", type=int, help="CPU threads; default as PyTorch chooses")
    p.add_argument("--output", type=Path, default=records.RESULTS, help="folder for the record and the pictures")
    p.add_argument(
        "--record", type=Path, help="go on with this record, whose cases are not measured again, or begin it"
    )
    p.add_argument("--no-pictures", action="store_true")
    return p


class Wanted(NamedTuple):
    op: str
    case: Case
    dtype: torch.dtype
    layout: str
    tf32: bool | None
    compiled: bool

    @property
    def name(self) -> str:
        return records.case_name(
            self.op, self.case.name, str(self.dtype).removeprefix("torch."), self.layout, self.tf32
        )


def selected(arguments: argparse.Namespace, device: torch.device) -> list[Wanted]:
    """The first case of each op first, so that a short budget sees all ops."""
    dtypes = [DTYPES[name] for name in arguments.dtype or DEFAULT_DTYPES[device.type]]
    per_op: list[list[Wanted]] = []
    for op in arguments.ops or BENCHMARKS:
        combinations = [
            (op, case, dtype, layout, tf32)
            for case in importlib.import_module(f"benchmarks.bench_{op}").cases(device.type)
            for dtype in dtypes
            for layout in case.layouts
            if arguments.case in case.name
            and dtype in case.dtypes
            and (not arguments.layout or layout in arguments.layout)
            for tf32 in ((False, True) if may_round(case, dtype, device) else (None,))
        ]
        of_op = [Wanted(*each, arguments.compiled == "all" or i == 0) for i, each in enumerate(combinations)]
        per_op.append(of_op[:1] if arguments.quick else of_op)
    return [of_op[i] for i in range(max(map(len, per_op), default=0)) for of_op in per_op if i < len(of_op)]


def may_round(case: Case, dtype: torch.dtype, device: torch.device) -> bool:
    return device.type == "cuda" and case.convolves and dtype == torch.float32


def main(command_line: list[str] | None = None) -> int:
    command_line = sys.argv[1:] if command_line is None else command_line
    for name, command in {"build": build_times, "contention": contention}.items():
        if command_line[:1] == [name]:
            return command.main(command_line[1:])
    p = parser()
    arguments = p.parse_args(command_line)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: PyTorch sees no GPU")
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if not (wanted := selected(arguments, device)):
        p.error("no case fits --case, --dtype and --layout")

    options = {
        "seconds": arguments.seconds or (0.2 if arguments.quick else 1.0),
        "min_rounds": 3 if arguments.quick else 5,
        "phases": tuple(arguments.phase) if arguments.phase else None,
        "peers": tuple(arguments.peers) if arguments.peers is not None else None,
    }
    if arguments.record and arguments.record.exists():
        record, path = records.from_json(arguments.record.read_text()), arguments.record
        wanted = left_to_do(wanted, record)
    else:
        record = records.Record(environment.describe(device, command_line))
        path = arguments.record or records.new_file(arguments.output, record)
    save(record, path)
    print(f"{record.environment['device']['name']}, {len(wanted)} cases, record {path}\n", flush=True)
    try:
        alive = run(wanted, device, record, path, START + (arguments.end_within or float("inf")), options)
    except KeyboardInterrupt:  # what has been measured is on disk
        print("Interrupted.")
        return 130
    if not alive:
        return DEVICE_LOST
    if not arguments.no_pictures:
        draw(record, arguments.output)
    wrong = [row for row in record.rows if not row.ours]
    for row in wrong:
        print(f"NOT TIMED: {row.name}: {row.problems.get(records.OURS)}")
    failed = {name: reason for name, reason in record.missing.items() if reason != NOT_REACHED}
    for name, reason in failed.items():
        print(f"NOT MEASURED: {name}: {reason}")
    print(f"{len(record.rows)} rows in {time.monotonic() - START:.0f} s: {path}")
    return 1 if wrong or failed else 0


def left_to_do(wanted: list[Wanted], record: records.Record) -> list[Wanted]:
    """Those that are not in the record; one that ended its process is not tried again."""
    tried = {row.name for row in record.rows} | record.missing.keys()
    not_reached = {name for name, reason in record.missing.items() if reason == NOT_REACHED}
    return [each for each in wanted if each.name not in tried - not_reached]


def run(wanted: list[Wanted], device, record, path, end: float, options) -> bool:
    """Measures until `end`; false where the device is lost."""
    longest = {True: 0.0, False: 0.0}  # compiling takes longer than all else
    for done, each in enumerate(wanted):
        start = time.monotonic()
        if start + longest[each.compiled] > end:
            record.missing.update({later.name: NOT_REACHED for later in wanted[done:]})
            save(record, path)
            print(f"Out of time: {len(wanted) - done} of {len(wanted)} cases were not run.")
            return True
        record.missing[each.name] = CUT_SHORT
        save(record, path)
        op, case, dtype, layout, tf32, compiled = each
        try:
            for row in measure(op, case, device, dtype, layout, tf32=tf32, compiled_peers=compiled, **options):
                record.rows.append(row)
                save(record, path)
                print(format_row(row) + "\n", flush=True)
            synchronize(device)
            del record.missing[each.name]
        except Exception as error:  # the other cases are still worth measuring
            traceback.print_exc()
            record.missing[each.name] = failure(error)
        save(record, path)
        if not answers(device):
            print(f"The device is lost since {each.name}.")
            return False
        release(device)
        longest[compiled] = max(longest[compiled], time.monotonic() - start)
    return True


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def answers(device: torch.device) -> bool:
    try:
        synchronize(device)
    except RuntimeError:
        return False
    return True


def save(record: records.Record, path: Path) -> None:
    """After every row, in one step, so that a run that is cut short leaves what it has measured."""
    text = records.to_json(record)
    write_atomically(str(path), lambda temporary: Path(temporary).write_text(text))


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
