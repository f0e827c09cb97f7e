"""A row for each launch of a kernel: its configuration, what its machine code shows, and what is predicted from both."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks import cuobjdump
from benchmarks.cuobjdump import Resources
from benchmarks.hot_kernels import Analysis, analyze, hot
from benchmarks.launches import Call
from benchmarks.prediction import blocks_on_multiprocessor
from tests.emulation.observation import Fits, Launch, Requests

COLUMNS = (
    "grid block shared blocks waves registers stack instr special loads KB ahead bytes sectors banks us copy".split()
)


@dataclass(frozen=True)
class Row:
    """A launch; without an analysis where the kernel is not a hot one."""

    kernel: str
    launch: Launch
    resources: Resources
    analysis: Analysis | None

    @property
    def threads(self) -> int:
        return self.launch.block[0] * self.launch.block[1] * self.launch.block[2]

    @property
    def widths(self) -> str:
        """Bytes of a thread's loads | stores on the main path."""
        return f"{_widths(self.analysis.round.loads)} | {_widths(self.analysis.round.stores)}" if self.analysis else ""

    def cells(self) -> list[str]:
        launch, found = self.launch, self.analysis
        first = [_size(launch.grid), _size(launch.block), str(launch.shared_bytes)]
        code = [str(self.resources.registers), str(self.resources.stack)]
        memory = [_ratios(launch.loads, launch.stores), _ratio(launch.shared_loads, launch.shared_stores)]
        if found is None:
            return [*first, "", "", *code, "", "", "", "", "", "", *memory, "", ""]
        return [
            *first,
            str(found.blocks),
            f"{found.prediction.waves:.1f}",
            *code,
            f"{found.instructions:.1f}",
            f"{found.special:.1f}",
            f"{found.round.loads_in_flight:.1f}",
            f"{found.bytes_in_flight(self.threads) / 1000:.1f}",
            f"{found.ahead:.0f}",
            self.widths,
            *memory,
            f"{found.prediction.microseconds:.1f}",
            f"{found.prediction.percent_of_copy:.0f} %",
        ]


@cache
def kernels_of(path: Path, tool: str) -> dict[str, tuple[str, Resources]]:
    """Symbol and resources of each kernel of a built library, by its C++ name."""
    resources = {symbol: found for (symbol, _), found in cuobjdump.resources(path, tool).items()}
    return dict(zip(cuobjdump.readable(list(resources)), resources.items(), strict=True))


class Library:
    """The built CUDA library; of its code only that of the kernels with these C++ names is read."""

    def __init__(self, path: Path, tool: str, kernels: Iterable[str]) -> None:
        self.kernels = kernels_of(path, tool)
        wanted = [self.kernels[kernel][0] for kernel in kernels]
        self.codes = {symbol: code for symbol, _, code in cuobjdump.codes(path, tool, wanted)}

    def row(self, name: str, call: Call, launch: Launch, itemsize: int) -> Row:
        (symbol, resources), kernel = self.kernels[name], hot(name)
        found = analyze(kernel, self.codes[symbol], resources.registers, call, launch, itemsize) if kernel else None
        return Row(name.partition("::")[2], launch, resources, found)


def fits_of(path: Path, tool: str) -> Fits:
    """How many blocks of the kernels of a built library fit on a multiprocessor; the emulation asks by its own symbols."""

    def fits(symbol: str, threads: int, shared_bytes: int) -> int:
        (name,) = cuobjdump.readable([symbol])
        return blocks_on_multiprocessor(threads, kernels_of(path, tool)[name][1].registers, shared_bytes)

    return fits


def rows_of(path: Path, tool: str, all_calls: list[Call], itemsize: int) -> list[list[Row]]:
    """Of each call, in the order of its launches."""
    symbols = list({launch.kernel for call in all_calls for launch in call.launches})
    names = dict(zip(symbols, cuobjdump.readable(symbols), strict=True))
    library = Library(path, tool, filter(hot, names.values()))
    return [[library.row(names[one.kernel], call, one, itemsize) for one in call.launches] for call in all_calls]


def _size(size: tuple[int, int, int]) -> str:
    return "x".join(str(n) for n in (size[:2] if size[2] == 1 else size))


def _widths(sizes: list[int]) -> str:
    return " ".join(str(size) for size in sorted(set(sizes), reverse=True)) or "-"


def _ratio(*requests: Requests) -> str:
    least = sum(one.least for one in requests)
    return f"{sum(one.touched for one in requests) / least:.2f}" if least else "-"


def _ratios(*requests: Requests) -> str:
    return " | ".join(_ratio(one) for one in requests)
