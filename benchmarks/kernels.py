"""What the machine code and the launches of the CUDA kernels say about their speed on an H200. No GPU has said so.

    python -m benchmarks.kernels                        # the kernels of all ops, launched as for their benchmarks on a GPU
    python -m benchmarks.kernels --op fusion --dtype float32 --layout contiguous --case P3
    python -m benchmarks.kernels --list --name nms::    # registers, stack, and loads and stores by width of every kernel
    python -m benchmarks.kernels --docs                 # writes the tables of docs/kernels

Code is read by cuobjdump from the built library, launches are seen by the emulation (g++), and `prediction.py` puts both
together. Columns: `blocks`: that fit on a multiprocessor; `instr` and `special`: instructions, and special functions among them,
an element; `loads`: loads of global memory under way when a warp waits for one, on average over a round of the main path;
`KB`: their bytes on a multiprocessor; `ahead`: instructions between a load and the wait for it, of the median load; `bytes`: of
a thread's loads | stores on the main path; `sectors`: of 32 bytes that loads | stores of global memory touch, over the fewest
possible; `banks`: turns that shared memory takes, likewise; `us`, `copy`: predicted time, and the kernel's own bytes at the rate
of a copy in percent of it.
"""

import argparse
from collections import Counter
from pathlib import Path

from benchmarks import OPS, cuobjdump, kernel_pages, records
from benchmarks.kernel_rows import COLUMNS, Row, fits_of, rows_of
from benchmarks.launches import Call, calls_with_requests
from benchmarks.machine_code import GLOBAL_LOADS, GLOBAL_STORES, Code
from benchmarks.workload import CHANNELS_LAST, CONTIGUOUS, DTYPES
from effdet_fast import _libraries


def print_calls(path: Path, tool: str, arguments: argparse.Namespace) -> None:
    dtype, everything = DTYPES[arguments.dtype], records.load_all()
    ops = [arguments.op] if arguments.op else OPS
    fits = fits_of(path, tool)
    found = [call for op in ops for call in calls_with_requests(op, dtype, arguments.layout, fits, arguments.case)]
    for call, rows in zip(found, rows_of(path, tool, found, dtype.itemsize), strict=True):
        known = [row.analysis.prediction.microseconds for row in rows if row.analysis]
        total = _total(rows, known) + measured(call, arguments.dtype, arguments.layout, everything)
        print(f"\n{call.op}: {call.case}, {arguments.dtype}, {arguments.layout}, {call.phase}: {total}")
        cells = [("", *COLUMNS), *((row.kernel, *row.cells()) for row in rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        for row in cells:
            print("  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]))


def _total(rows: list[Row], known: list[float]) -> str:
    launches = f"{len(rows)} launch{'es' * (len(rows) > 1)}"
    return f"{launches}, {sum(known):.0f} us predicted for {len(known)} of them" if known else launches


def measured(call: Call, dtype: str, layout: str, everything: list[records.Record]) -> str:
    """What the newest record of a GPU says of all launches of the call; nothing where there is none."""
    for record in reversed(everything):
        for row in record.rows if record.device_type == "cuda" else []:
            if (row.op, row.case, row.phase, row.dtype, row.layout) == (
                call.op,
                call.case,
                call.phase,
                dtype,
                layout,
            ) and row.ours:
                return f", {row.ours.median * 1e6:.0f} us measured on {record.device_name}"
    return ""


def print_list(path: Path, tool: str, name: str) -> None:
    """Registers, stack and accesses by width of every kernel."""
    resources = cuobjdump.resources(path, tool)
    names = dict(zip((symbol for symbol, _ in resources), cuobjdump.readable([s for s, _ in resources]), strict=True))
    wanted = [symbol for symbol, _ in resources if name in names[symbol]]
    print(f"{'arch':>6} {'registers':>9} {'stack':>5}  kernel  loads | stores as bytes x count")
    for symbol, architecture, code in cuobjdump.codes(path, tool, wanted if name else ()):
        found = resources[symbol, architecture]
        accesses = " | ".join(_counts(code, kind) for kind in (GLOBAL_LOADS, GLOBAL_STORES))
        print(f"{architecture:>6} {found.registers:>9} {found.stack:>5}  {names[symbol]}  {accesses}")


def _counts(code: Code, kind: frozenset[str]) -> str:
    counts = Counter(one.bytes for one in code.instructions if one.name in kind)
    return " ".join(f"{width}x{counts[width]}" for width in sorted(counts, reverse=True)) or "-"


def write_pages(path: Path, tool: str, op: str | None, check: bool) -> int:
    old = 0
    for file, now, new in kernel_pages.pages(path, tool, op):
        if now != new and check:
            old += 1
            print(f"{file.relative_to(Path.cwd())} is old: python -m benchmarks.kernels --docs")
        elif now != new:
            file.write_text(new)
    return int(old > 0)


def main(command_line: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.partition("\n")[0])
    parser.add_argument("--op", choices=OPS, help="all of them by default")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--layout", choices=(CHANNELS_LAST, CONTIGUOUS), default=CHANNELS_LAST)
    parser.add_argument("--docs", action="store_true", help="write the tables of docs/kernels; with --op of one page")
    parser.add_argument(
        "--check", action="store_true", help="with --docs: write nothing, and fail where a table is old"
    )
    parser.add_argument("--list", action="store_true", help="registers, stack, and loads and stores of every kernel")
    parser.add_argument("--name", default="", help="with --list: only kernels whose C++ name contains this")
    arguments = parser.parse_args(command_line)
    tool, path = cuobjdump.find_cuobjdump(), _libraries.path_of("cuda")
    if tool is None or not path.exists():
        parser.error("needs cuobjdump (CUDA toolkit or Triton)" if path.exists() else "the CUDA kernels are not built")
    if arguments.docs:
        return write_pages(path, tool, arguments.op, arguments.check)
    if arguments.list:
        print_list(path, tool, arguments.name)
    else:
        print_calls(path, tool, arguments)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
