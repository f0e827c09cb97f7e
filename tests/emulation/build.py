"""Compiles the CUDA sources with the host compiler against cuda_emulation.h, one shared library for all ops."""

import fcntl
import hashlib
import os
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
    "-DEF_EMULATE_CUDA",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    f"-I{INCLUDE}",
    f"-I{ROOT / 'tests/emulation'}",
]


def sources(csrc: Path) -> list[Path]:
    """The launch functions and Tensor boundaries of every op, and the controls of the emulation."""
    boundaries = [p for p in csrc.glob("*/*.cpp") if not p.stem.endswith("_cpu")]
    return sorted([*csrc.glob("*/*_cuda.cu"), *boundaries]) + [ROOT / "tests/emulation/controls.cpp"]


def build(
    csrc: Path = ROOT / "csrc", defines: tuple[str, ...] = (), sanitize: bool = False, only: str | None = None
) -> Path:
    """Path of the library; rebuilt only where a source or header has changed.

    Args:
        csrc: the sources; a test may hand in a damaged copy.
        defines: extra macros.
        sanitize: with AddressSanitizer and UndefinedBehaviorSanitizer.
        only: leave out all ops but this one.
    """
    flags = [*FLAGS, *(f"-D{define}" for define in defines)]
    flags += (
        ["-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        if sanitize
        else ["-O2"]
    )
    headers = sorted(
        p for folder in (csrc, ROOT / "tests/emulation") for p in folder.rglob("*") if p.suffix in (".h", ".cuh")
    )
    common = hashlib.sha256(repr((flags, torch.__version__)).encode())
    for header in headers:
        common.update(header.read_bytes())
    folder = ROOT / "build/emulated"
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        key = common.copy()
        key.update(
            str(source.relative_to(csrc.parent if csrc in source.parents else ROOT)).encode() + source.read_bytes()
        )
        target = folder / f"{source.stem}-{key.hexdigest()[:20]}.o"
        if not target.exists():
            command = ["g++", *flags, "-x", "c++", "-c", str(source), "-o", f"{target}.tmp"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{source.name} does not compile for the emulation:\n{done.stderr[-6000:]}")
            os.replace(f"{target}.tmp", target)
        return target

    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        chosen = [s for s in sources(csrc) if only is None or s.parent.name in (only, "emulation")]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, chosen))
        name = hashlib.sha256("".join(map(str, objects)).encode()).hexdigest()[:20]
        library = folder / f"emulated-{name}.so"
        if not library.exists():
            link = ["g++", "-shared", *flags, *map(str, objects), "-o", f"{library}.tmp"]
            subprocess.run([*link, f"-L{INCLUDE.parent / 'lib'}", "-ltorch_cpu", "-lc10"], check=True)
            os.replace(f"{library}.tmp", library)
    return library
