"""Loads the libraries of kernels, `kernels_cpu.so` and `kernels_cuda.so`, or knows why they are not there."""

import importlib
import json
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from effdet_fast import _choices
from effdet_fast._build_info import read_build_info

missing: dict[str, str] = {}  # device type -> why its kernels are not loaded
REBUILD = "in the source folder: pip install --no-build-isolation --force-reinstall --no-deps ."
REBUILD_CUDA = f"{REBUILD} (with EFFDET_FAST_CUDA=1 it tells what is in the way)"
_warned_of_cuda = False


def path_of(device_type: str) -> Path:
    """Where the library with the kernels for "cpu" or "cuda" lies, if it was built."""
    return Path(__file__).with_name(f"kernels_{device_type}.so")


def _load(device_type: str) -> None:
    path = path_of(device_type)
    if not path.exists():
        missing[device_type] = "not built"
    elif reason := _why_not_here(path):
        missing[device_type] = reason
    else:
        try:
            torch.ops.load_library(path)
        except OSError as error:
            missing[device_type] = str(error)


def _why_not_here(path: Path) -> str | None:
    """Why a library must not be loaded in this package and this torch; None where it fits, or says nothing about itself."""
    info = read_build_info(path)
    return None if info is None else _why_not_for_this_package(info) or _why_not_for_this_torch(info)


def _why_not_for_this_package(info: dict[str, Any]) -> str | None:
    """Numbers that mean something else to the kernels would give wrong results without a word."""
    difference = _choices.difference(info.get("choices", ""))
    return None if difference is None else f"built from sources that do not fit this package: {difference}"


def _why_not_for_this_torch(info: dict[str, Any]) -> str | None:
    """CUDA's libraries are one set for each major version; with another one's, loading fails in words that help nobody."""
    built = info.get("cuda")
    if built is None or (torch.version.cuda or "").split(".")[0] == built.split(".")[0]:
        return None
    here = f"CUDA {torch.version.cuda}" if torch.version.cuda else "none"
    return f"built with CUDA {built}, but torch {torch.__version__} has {here}"


_load("cpu")
_load("cuda")
if "cpu" in missing:
    warnings.warn(
        "effdet_fast: the compiled kernels are not available, every op runs on its slower reference implementation "
        f"({missing['cpu']}). `effdet-fast doctor` says what to do.",
        RuntimeWarning,
        stacklevel=2,
    )


def warn_if_missing(device_type: str) -> bool:
    """Says once per process that and why tensors on a GPU run on the references; False, as no kernels are loaded."""
    global _warned_of_cuda
    if device_type == "cuda" and "cuda" in missing and not _warned_of_cuda:
        _warned_of_cuda = True
        warnings.warn(
            f"effdet_fast: the kernels for CUDA are not loaded ({missing['cuda']}), every op on a GPU runs on its slower "
            f"reference implementation. To change that, {REBUILD_CUDA}",
            stacklevel=4,
        )
    return False


# torch.compile calls it while it compiles; as torch.compiler.assume_constant_result, which would import torch._dynamo.
warn_if_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def native_device_types() -> frozenset[str]:
    """Device types that have compiled kernels."""
    return frozenset({"cpu", "cuda"} - missing.keys())


def build_info() -> dict[str, dict[str, Any] | None]:
    """What each library was built from and with, by device type; None for one that is not loaded.

    Both have `sources` (a hash of csrc and setup.py), `compiler` and `torch`; "cpu" has `cpu_levels` (the instruction sets that
    were compiled) and `cpu_level` (the one chosen on this processor), "cuda" has `cuda` (the toolkit's version) and `cuda_archs`.
    """
    info: dict[str, dict[str, Any] | None] = {"cpu": None, "cuda": None}
    if "cpu" not in missing:
        level = torch.ops.effdet_fast.cpu_level()
        info["cpu"] = {**_without_choices(torch.ops.effdet_fast.cpu_build_info()), "cpu_level": level}
    if "cuda" not in missing:
        info["cuda"] = _without_choices(torch.ops.effdet_fast.cuda_build_info())
    return info


def _without_choices(text: str) -> dict[str, Any]:
    """Those are the package's own, or the library would not have been loaded."""
    return {key: value for key, value in json.loads(text).items() if key != "choices"}


def helpers() -> ModuleType | None:
    """The optional pybind11 module `effdet_fast._C`; None where it was not built for this Python."""
    try:
        return importlib.import_module("effdet_fast._C")
    except ImportError:
        return None
