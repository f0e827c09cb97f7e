"""Compiles the CUDA sources with the host compiler against cuda_emulation.h, one shared library for all ops; or the CPU's, to be
looked at by sanitizers."""

import fcntl
import hashlib
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
INCLUDE = Path(torch.__file__).parent / "include"
FLAGS = [
    "-fPIC",
    "-std=c++20",
    "-g1",
    "-fopenmp-simd",
    "-ffp-contract=off",
    "-DEF_NAMESPACE=effdet_fast_emulated",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    f"-I{INCLUDE}",
    f"-I{ROOT / 'tests/emulation'}",
]


def sources(csrc: Path, kernels: str) -> list[Path]:
    """The launch functions and Tensor boundaries of every op, and the controls of the emulation."""
    boundaries = (folder / f"{folder.name}.cpp" for folder in csrc.iterdir())
    return sorted([*csrc.glob(kernels), *(file for file in boundaries if file.exists())]) + [
        ROOT / "tests/emulation/controls.cpp"
    ]


def included(source: Path) -> set[Path]:
    """The file and all of ours that it includes: what its object depends on."""
    found: set[Path] = set()
    left = [source]
    while left:
        file = left.pop().resolve()
        if file in found:
            continue
        found.add(file)
        for name in re.findall(r'^#include "(.+)"', file.read_text(), re.MULTILINE):
            beside = file.parent / name
            left.append(beside if beside.exists() else ROOT / "tests/emulation" / name)
    return found


def build(
    csrc: Path = ROOT / "csrc",
    defines: tuple[str, ...] = (),
    sanitize: bool = False,
    only: str | None = None,
    only_float32: bool = False,
    cpu: bool = False,
    observe: bool = False,
) -> Path:
    """Path of the library; an object is rebuilt only where its source or a header that it includes has changed.

    Args:
        csrc: the sources; a test may hand in a damaged copy.
        defines: extra macros.
        sanitize: with AddressSanitizer and UndefinedBehaviorSanitizer.
        only: leave out all ops but this one.
        only_float32: leave out the other dtypes: enough for the self-tests, in a quarter of the time.
        cpu: the CPU's kernels instead of the emulated ones.
        observe: the kernels tell what memory they ask for (requests.cpp); vectors stay whole, as nvcc leaves them.
    """
    flags = [
        *FLAGS,
        *([] if cpu else ["-DEF_EMULATE_CUDA"]),
        *(f"-D{define}" for define in defines),
        *(["-DEF_ONLY_FLOAT32"] if only_float32 else []),
    ]
    flags += (
        ["-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        if sanitize
        else ["-O2"]
    )
    if observe:
        flags += ["-DEF_OBSERVE", "-fno-tree-sra", "-fno-ipa-sra"]
    folder = ROOT / "build/emulated"
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        # For the calls that it makes at every access; its library is not linked.
        options = ["-fsanitize=thread"] if observe and source.parent.name != "emulation" else []
        key = hashlib.sha256(repr((flags, options, torch.__version__, source.name)).encode())
        for file in sorted(included(source), key=lambda file: file.parts[-2:]):  # a copy has the order of the original
            key.update(file.name.encode() + file.read_bytes())
        target = folder / f"{source.stem}-{key.hexdigest()[:20]}.o"
        make(target, *options, "-x", "c++", "-c", str(source))
        return target

    def make(target: Path, *arguments: str) -> None:
        with open(target.with_suffix(".lock"), "w") as lock:  # other processes wait for this file only
            fcntl.flock(lock, fcntl.LOCK_EX)
            if target.exists():
                return
            command = ["g++", *flags, *arguments, "-o", f"{target}.tmp"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{target.name} cannot be built for the emulation:\n{done.stderr[-6000:]}")
            os.replace(f"{target}.tmp", target)

    chosen = [
        s
        for s in sources(csrc, "*/*_cpu*.cpp" if cpu else "*/*_cuda*.cu")
        if only is None or s.parent.name in (only, "emulation")
    ]
    if only_float32:
        chosen = [s for s in chosen if not s.stem.endswith(("_double", "_half", "_bfloat16"))]
    chosen += [ROOT / "tests/emulation/requests.cpp"] if observe else []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, chosen))
    name = hashlib.sha256("".join(map(str, objects)).encode()).hexdigest()[:20]
    library = folder / f"emulated-{name}.so"
    make(library, "-shared", *map(str, objects), f"-L{INCLUDE.parent / 'lib'}", "-ltorch_cpu", "-lc10")
    return library
