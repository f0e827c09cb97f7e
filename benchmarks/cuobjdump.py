"""What cuobjdump tells about the kernels of a library. It is of the CUDA toolkit, or comes with Triton; no GPU is needed."""

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine_code import Code, instructions_of


def find_cuobjdump() -> str | None:
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")
    folders = [Path(p) / "backends/nvidia/bin" for p in (triton.submodule_search_locations or [] if triton else [])]
    if home := os.environ.get("CUDA_HOME"):
        folders.append(Path(home) / "bin")
    return next((str(folder / "cuobjdump") for folder in folders if (folder / "cuobjdump").exists()), None)


@dataclass(frozen=True)
class Resources:
    """A kernel's registers and bytes of stack; a stack means spilled or indexed local arrays."""

    registers: int
    stack: int


def resources(library: Path, cuobjdump: str) -> dict[tuple[str, str], Resources]:
    """By symbol and architecture, of all kernels of `library`; none if it holds no CUDA code."""
    found = {}
    architecture = function = ""
    for line in _lines(cuobjdump, library, "-res-usage"):
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r" *Function ([^:]+):", line):
            function = match[1]
        elif match := re.match(r" *REG:(\d+) STACK:(\d+)", line):
            found[function, architecture] = Resources(int(match[1]), int(match[2]))
    return found


def architectures(library: Path, cuobjdump: str) -> list[str]:
    return sorted({architecture for _, architecture in resources(library, cuobjdump)})


def compiler(library: Path) -> str:
    """The version of the nvcc that built it."""
    found = re.search(rb"Cuda compilation tools, release [\d.]+, V([\d.]+)", library.read_bytes())
    return found[1].decode() if found else "unknown"


def codes(library: Path, cuobjdump: str, functions: Iterable[str] = ()) -> Iterator[tuple[str, str, Code]]:
    """Symbol, architecture and code of these functions, of all by default, which takes half a minute."""
    architecture, function, lines = "", "", list[str]()
    for line in _lines(cuobjdump, library, "-sass", *(["-fun", ",".join(functions)] if functions else [])):
        if match := re.match(r"(arch) = (\w+)|\s*Function : (\S+)", line):
            if lines:
                yield function, architecture, Code(instructions_of(lines))
            architecture, function, lines = match[2] or architecture, match[3] or "", []
        elif function:
            lines.append(line)
    if lines:
        yield function, architecture, Code(instructions_of(lines))


def _lines(cuobjdump: str, library: Path, *options: str) -> Iterator[str]:
    # nvdisasm, which -sass calls, lies beside it.
    path = os.pathsep.join([str(Path(cuobjdump).parent), os.environ.get("PATH", "")])
    command = [cuobjdump, *options, str(library)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, "PATH": path}
    ) as process:
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
