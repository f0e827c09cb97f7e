"""The tables of the pages in docs/kernels, which `python -m benchmarks.kernels --docs` writes."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from benchmarks import OPS, cuobjdump
from benchmarks.kernel_rows import Row, fits_of, rows_of
from benchmarks.launches import Call, calls_with_requests
from benchmarks.table import between
from benchmarks.workload import CHANNELS_LAST, CONTIGUOUS

FOLDER = Path(__file__).parents[1] / "docs/kernels"
PAGES: dict[str, tuple[str, ...]] = {op: (op,) for op in OPS if op not in ("depthwise_conv", "nms", "soft_nms")}
PAGES |= {"depthwise_conv_cuda": ("depthwise_conv",), "nms": ("nms", "soft_nms")}
BEGIN, END = "<!-- kernels:begin -->", "<!-- kernels:end -->"
FIRST_TITLES = ["kernel", "registers", "a block"]
TITLES = [*FIRST_TITLES, "blocks", "instructions", "special", "loads under way", "KB", "ahead", "bytes", "of a copy"]
LARGE = 64e6  # bytes; a percentage of less says little
HEAD = """{kinds}; nvcc {version}, {architectures}. **Predicted, not measured.**
[What the columns mean](index.md#the-tables-of-the-kernels).
"""


def pages(path: Path, tool: str, op: str | None) -> Iterator[tuple[Path, str, str]]:
    """The page of this op, or all: each with its text now and with a new table."""
    for page, ops in PAGES.items():
        if op is None or op in ops:
            file = FOLDER / f"{page}.md"
            text = file.read_text()
            yield file, text, between(file.name, text, BEGIN, END, table_of(ops, path, tool))


def table_of(ops: Iterable[str], path: Path, tool: str) -> str:
    """bfloat16 in both layouts; float32 of the ops that have no other."""
    kinds, fits = [(torch.bfloat16, CHANNELS_LAST), (torch.bfloat16, CONTIGUOUS)], fits_of(path, tool)
    found = [
        (dtype, layout, call)
        for op in ops
        for dtype, layout in kinds
        for call in calls_with_requests(op, dtype, layout, fits)
    ]
    if not found:
        found = [
            (torch.float32, CONTIGUOUS, call)
            for op in ops
            for call in calls_with_requests(op, torch.float32, CONTIGUOUS, fits)
        ]
    all_calls = [call for _, _, call in found]
    by_kernel: dict[str, list[Row]] = {}
    for row in (row for rows in rows_of(path, tool, all_calls, found[0][0].itemsize) for row in rows):
        by_kernel.setdefault(row.kernel, []).append(row)
    hot = any(row.analysis for rows in by_kernel.values() for row in rows)
    titles = TITLES if hot else FIRST_TITLES
    names = dict.fromkeys(f"{str(dtype).removeprefix('torch.')} {layout}" for dtype, layout, _ in found)
    version, architectures = cuobjdump.compiler(path), ", ".join(cuobjdump.architectures(path, tool))
    head = HEAD.format(version=version, architectures=architectures, kinds=" and ".join(names))
    lines = [f"| {' | '.join(titles)} |", f"| {' | '.join(['---'] * len(titles))} |"]
    lines += [f"| {' | '.join(_cells(name, rows)[: len(titles)])} |" for name, rows in by_kernel.items()]
    return "\n".join([head, *lines, "", _launches(all_calls)])


def _cells(name: str, rows: list[Row]) -> list[str]:
    first = rows[0]
    cells = [f"`{name.replace('c10::', '')}`", str(first.resources.registers), str(first.threads)]
    all_found = [row.analysis for row in rows if row.analysis]
    if not all_found:
        return [*cells, *[""] * (len(TITLES) - len(cells))]
    found = all_found[0]
    percents = [one.prediction.percent_of_copy for one in all_found if one.prediction.bytes >= LARGE]
    return [
        *cells,
        str(found.blocks),
        _range(one.instructions for one in all_found),
        _range(one.special for one in all_found),
        f"{found.round.loads_in_flight:.1f}",
        f"{found.bytes_in_flight(first.threads) / 1000:.1f}",
        f"{found.ahead:.0f}",
        first.widths.replace("|", "/"),
        f"{_range(percents, 0)} %" if percents else "",
    ]


def _range(values: Iterable[float], digits: int = 1) -> str:
    found = list(values)
    low, high = (f"{value:.{digits}f}" for value in (min(found), max(found)))
    return low if low == high else f"{low} to {high}"


def _launches(all_calls: list[Call]) -> str:
    counts: dict[str, set[int]] = {}
    for call in all_calls:
        counts.setdefault(call.phase, set()).add(len(call.launches))
    parts = [f"{phase} {' or '.join(str(n) for n in sorted(found))}" for phase, found in counts.items()]
    return f"Launches a call: {', '.join(parts)}."
