"""Registers, stack and load widths of each CUDA kernel in the built library, read from its machine code.

    python -m benchmarks.kernels            # registers and stack; a stack means spilled or indexed local arrays
    python -m benchmarks.kernels --widths   # also loads and stores of global memory by width; takes a minute

Needs cuobjdump: of the CUDA toolkit, or the one that comes with Triton. No GPU.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from effdet_fast import _libraries

# Bytes per thread in the names of global loads (LDG) and stores (STG); an instruction without one moves 4.
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


@dataclass
class Kernel:
    """One kernel for one architecture. `loads` and `stores` count instructions by bytes per thread."""

    name: str
    architecture: str
    registers: int
    stack: int
    loads: Counter[int] = field(default_factory=Counter)
    stores: Counter[int] = field(default_factory=Counter)


def find_cuobjdump() -> str | None:
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")
    folders = [Path(p) / "backends/nvidia/bin" for p in (triton.submodule_search_locations or [] if triton else [])]
    if home := os.environ.get("CUDA_HOME"):
        folders.append(Path(home) / "bin")
    return next((str(folder / "cuobjdump") for folder in folders if (folder / "cuobjdump").exists()), None)


def kernels(library: Path, cuobjdump: str, widths: bool = False) -> list[Kernel]:
    """The kernels of `library`, in the order of their names; none if it holds no CUDA code."""
    found: dict[tuple[str, str], Kernel] = {}
    architecture = function = ""
    for line in _lines(cuobjdump, "-res-usage", library):
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r" *Function ([^:]+):", line):
            function = match[1]
        elif match := re.match(r" *REG:(\d+) STACK:(\d+)", line):
            found[architecture, function] = Kernel(function, architecture, int(match[1]), int(match[2]))
    if widths and found:
        _count_accesses(library, cuobjdump, found)
    return sorted(found.values(), key=lambda kernel: (kernel.name, kernel.architecture))


def _count_accesses(library: Path, cuobjdump: str, found: dict[tuple[str, str], Kernel]) -> None:
    architecture = ""
    kernel: Kernel | None = None
    for line in _lines(cuobjdump, "-sass", library):
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            kernel = found[architecture, match[1]]
        elif kernel and (match := re.search(r"\b(LDG|STG)((?:\.\w+)*)", line)):
            width = next((WIDTHS[part] for part in match[2].split(".") if part in WIDTHS), 4)
            (kernel.loads if match[1] == "LDG" else kernel.stores)[width] += 1


def _lines(cuobjdump: str, option: str, library: Path) -> Iterator[str]:
    # nvdisasm, which -sass calls, lies beside it.
    path = os.pathsep.join([str(Path(cuobjdump).parent), os.environ.get("PATH", "")])
    command = [cuobjdump, option, str(library)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PATH": path}) as process:
        assert process.stdout is not None
        yield from process.stdout
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with exit status {process.returncode}")


def readable(names: list[str]) -> list[str]:
    """C++ names of the mangled ones, without parameters; as they are where there is no c++filt."""
    if not names or not shutil.which("c++filt"):
        return names
    # Older demanglers do not know the _Float16-style conditional types of parameters, so those are left out.
    done = subprocess.run(["c++filt", "-p", *names], capture_output=True, text=True, check=True)
    return [re.sub(r"^void |ef::", "", name) for name in done.stdout.splitlines()]


def main(command_line: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.partition("\n")[0])
    parser.add_argument("--name", default="", help="only kernels whose C++ name contains this")
    parser.add_argument("--widths", action="store_true", help="count global loads and stores by bytes per thread")
    arguments = parser.parse_args(command_line)
    cuobjdump, library = find_cuobjdump(), _libraries.path_of("cuda")
    if cuobjdump is None or not library.exists():
        parser.error(
            "needs cuobjdump (CUDA toolkit or Triton)" if library.exists() else "the CUDA kernels are not built"
        )
    found = kernels(library, cuobjdump, arguments.widths)
    print(
        f"{'arch':>6} {'registers':>9} {'stack':>5}  kernel" + ("  loads | stores as bytes x count" * arguments.widths)
    )
    for kernel, name in zip(found, readable([kernel.name for kernel in found]), strict=True):
        if arguments.name in name:
            accesses = f"  {_show(kernel.loads)} | {_show(kernel.stores)}" if arguments.widths else ""
            print(f"{kernel.architecture:>6} {kernel.registers:>9} {kernel.stack:>5}  {name}{accesses}")
    return 0


def _show(counts: Counter[int]) -> str:
    return " ".join(f"{width}x{counts[width]}" for width in sorted(counts, reverse=True)) or "-"


if __name__ == "__main__":
    raise SystemExit(main())
