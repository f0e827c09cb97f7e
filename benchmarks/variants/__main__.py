"""Builds the program that measures the variants, for the GPUs in TORCH_CUDA_ARCH_LIST. Needs nvcc, and no GPU.

python -m benchmarks.variants build/variants
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.environment import ROOT

sys.path.insert(0, str(ROOT / "csrc"))

from toolkit import cuda_archs, find_toolkit

SOURCE = Path(__file__).with_name("variants.cu")


def command(nvcc: str, program: Path) -> list[str]:
    """CUDA's runtime is in the program, as the machine with the GPU may have no toolkit."""
    archs = [arch for arch in cuda_archs().split(", ") if arch.startswith("sm_")]
    targets = [f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in archs]
    include = Path(torch.__file__).parent / "include"
    names = f'-DEF_CUDA_ARCHS="{", ".join(archs)}"'
    options = ["-std=c++20", "-O1", "-cudart=static", *targets, names, f"-I{include}"]
    return [nvcc, *options, str(SOURCE), "-o", str(program)]


def main(command_line: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.variants", description=__doc__.partition("\n")[0])
    parser.add_argument("program", type=Path, help="where to put it")
    arguments = parser.parse_args(command_line)
    toolkit = find_toolkit()
    if toolkit is None:
        parser.error("no CUDA toolkit found; put nvcc on PATH or set CUDA_HOME")
    arguments.program.parent.mkdir(parents=True, exist_ok=True)
    return subprocess.run(command(f"{toolkit[0]}/bin/nvcc", arguments.program)).returncode


if __name__ == "__main__":
    raise SystemExit(main())
