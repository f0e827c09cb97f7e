"""What this installation consists of, whether each op works on each backend, and what to do about what is missing."""

import contextlib
import importlib.util
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from effdet_fast import _libraries
from effdet_fast._build_info import covers, sources_hash
from effdet_fast._libraries import REBUILD, REBUILD_CUDA
from effdet_fast.self_tests import SELF_TESTS, TOLERANCE
from effdet_fast.version import __version__


@dataclass
class Finding:
    """One line of the report. `remedy` says in one line what to do; `failed` makes the whole report fail."""

    name: str
    value: str
    remedy: str | None = None
    failed: bool = False


@dataclass
class Report:
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not any(finding.failed for finding in self.findings)

    def add(self, name: str, value: str, remedy: str | None = None, failed: bool = False) -> None:
        self.findings.append(Finding(name, value, remedy, failed))


def diagnose() -> Report:
    """Looks at versions, at what was built, and runs each op on each backend present against its reference."""
    report = Report()
    report.add("effdet_fast", __version__)
    report.add("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    report.add("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})")
    _add_packages(report)
    _add_toolchain(report)
    _add_gpus(report)
    _add_build(report)
    for device in _devices():
        _add_self_tests(report, device)
    return report


def _add_packages(report: Report) -> None:
    for package in ("numpy", "pycocotools", "pillow", "tqdm"):
        try:
            report.add(package, version(package))
        except PackageNotFoundError:
            report.add(package, "missing", f"pip install {package}", failed=True)
    if importlib.util.find_spec("matplotlib") is None:
        report.add("matplotlib", "not installed (only for curves)", "pip install matplotlib")


def _add_toolchain(report: Report) -> None:
    compiler = _first_line("c++", "--version")
    remedy = "install a C++20 compiler (g++ >= 10 or clang >= 12) to build the kernels from source"
    report.add("C++ compiler", compiler or "not found", None if compiler else remedy)
    nvcc = next((line for line in _output("nvcc", "--version").splitlines() if "release" in line), "")
    remedy = "to build CUDA kernels, install the CUDA toolkit of torch's major version, or set CUDA_HOME"
    report.add("nvcc", nvcc.strip() or "not on PATH", remedy if not nvcc and torch.version.cuda else None)


def _add_gpus(report: Report) -> None:
    if not torch.cuda.is_available():
        report.add(
            "GPU",
            "none visible",
            "on a machine with an NVIDIA GPU: see that nvidia-smi works and torch is a CUDA build",
        )
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(i)
        report.add(f"GPU {i}", f"{torch.cuda.get_device_name(i)} (sm_{major}{minor})")


def _add_build(report: Report) -> None:
    """The libraries of kernels: what is loaded, what is missing, and whether they fit the GPUs and the sources beside them."""
    info, gpu = _libraries.build_info(), torch.cuda.is_available()
    if cpu := info["cpu"]:
        report.add("CPU kernels", f"{cpu['cpu_levels']} ({cpu['cpu_level']} chosen on this processor), {_origin(cpu)}")
    else:
        reason = f"not loaded: {_libraries.missing['cpu']}; every op runs on its reference implementation"
        report.add("CPU kernels", reason, REBUILD, failed=True)
    if cuda := info["cuda"]:
        report.add("CUDA kernels", f"CUDA {cuda['cuda']} ({cuda['cuda_archs']}), {_origin(cuda)}")
        for i in range(torch.cuda.device_count() if gpu else 0):
            capability = torch.cuda.get_device_capability(i)
            if not covers(cuda["cuda_archs"], capability):
                arch = "{}.{}".format(*capability)
                remedy = f"with TORCH_CUDA_ARCH_LIST={arch}, {REBUILD}"
                value = f"kernels built for {cuda['cuda_archs']}, not for this GPU's sm_{arch}"
                report.add(f"GPU {i}", value, remedy, failed=True)
    else:
        reason = f"not loaded: {_libraries.missing['cuda']}"
        report.add("CUDA kernels", reason, REBUILD_CUDA if gpu else None, failed=gpu)
    checkout = Path(__file__).resolve().parents[1]
    built_from = {library["sources"] for library in info.values() if library}
    if built_from and (checkout / "csrc").is_dir() and built_from != {sources_hash(checkout)}:
        report.add("sources", "changed since the kernels were built", REBUILD)
    if helpers := _libraries.helpers():
        report.add("processor", " ".join(helpers.processor_features()))
    else:
        report.add("processor", "not asked: effdet_fast._C was not built for this Python (optional)")


def _origin(info: dict[str, Any]) -> str:
    return f"by {info['compiler']}, against torch {info['torch']}, sources {info['sources']}"


def _devices() -> list[torch.device]:
    native = _libraries.native_device_types()
    names = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return [torch.device(name) for name in names if name in native]


def _add_self_tests(report: Report, device: torch.device) -> None:
    for name, check in SELF_TESTS.items():
        try:
            with convolutions(tf32=False):
                error = check(device)
            failed = not error <= TOLERANCE
            report.add(
                f"{name} on {device.type}",
                f"differs from its reference by {error:.1e}" if failed else "ok",
                failed=failed,
            )
        except Exception as error:  # the report must list every op, whatever went wrong in one
            report.add(f"{name} on {device.type}", f"{type(error).__name__}: {error}", REBUILD, failed=True)


@contextlib.contextmanager
def convolutions(tf32: bool) -> Iterator[None]:
    """cuDNN's convolutions of float32 round their inputs to TF32, 10 bits, as they do unless told otherwise; or do not."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _first_line(*command: str) -> str:
    return _output(*command).partition("\n")[0]
