"""Finds the CUDA toolkit that the kernels are compiled with, and the architectures they are compiled for. Used by `setup.py`."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

DEFAULT_CUDA_ARCHS = "8.0;9.0+PTX"  # without a GPU to ask; 8.0 code runs on 8.6 and 8.9, PTX on everything newer


def output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""


def find_toolkit() -> tuple[Path, str] | None:
    """Folder and version of the CUDA toolkit. The nvcc on PATH may be a wrapper script, so it is asked where it lives."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        dry_run = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
        )
        candidates += re.findall(r"^#\$ TOP=(.+)$", dry_run.stderr + dry_run.stdout, re.MULTILINE)
        candidates.append(str(Path(nvcc).resolve().parents[1]))
    candidates.append("/usr/local/cuda")
    for candidate in filter(None, candidates):
        home = Path(candidate.strip()).resolve()
        if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists():
            if version := re.search(r"release (\d+\.\d+)", output_of(str(home / "bin/nvcc"), "--version")):
                return home, version[1]
    return None


def why_no_cuda(toolkit: tuple[Path, str] | None) -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build; install a CUDA build of torch"
    if toolkit is None:
        return f"no CUDA toolkit found; install CUDA {torch.version.cuda.split('.')[0]}.x (nvcc and headers) or set CUDA_HOME"
    if toolkit[1].split(".")[0] != torch.version.cuda.split(".")[0]:
        return (
            f"nvcc is CUDA {toolkit[1]} ({toolkit[0]}) but torch was built with CUDA {torch.version.cuda}; point CUDA_HOME to "
            f"a CUDA {torch.version.cuda.split('.')[0]}.x toolkit or install a torch built with CUDA {toolkit[1].split('.')[0]}.x"
        )
    return None


def choose_cuda() -> tuple[Path, str] | None:
    wanted = os.environ.get("EFFDET_FAST_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"effdet_fast: EFFDET_FAST_CUDA must be auto, 0 or 1, got {wanted}")
    if wanted == "0":
        return None
    toolkit = find_toolkit()
    if reason := why_no_cuda(toolkit):
        if wanted == "1":
            sys.exit(f"effdet_fast: EFFDET_FAST_CUDA=1, but CUDA cannot be built: {reason}")
        print(f"effdet_fast: building without CUDA: {reason}")
        return None
    return toolkit


def cuda_archs() -> str:
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        visible = torch.cuda.is_available() and {
            "{}.{}".format(*torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())
        }
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(sorted(visible)) if visible else DEFAULT_CUDA_ARCHS
    archs = re.split(r"[;\s]+", os.environ["TORCH_CUDA_ARCH_LIST"].strip())
    names = ["sm_" + arch.removesuffix("+PTX").replace(".", "") for arch in archs]
    return ", ".join(names + (["PTX"] if any(arch.endswith("+PTX") for arch in archs) else []))
