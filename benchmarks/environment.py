"""What a measurement was made with: device, versions, build, commit, threads."""

import os
import platform
import re
import shlex
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from effdet_fast import __version__, _libraries

ROOT = Path(__file__).parents[1]
SOURCES = ("csrc", "effdet_fast", "benchmarks/*.py", "setup.py")


def describe(device: torch.device, command_line: list[str]) -> dict[str, Any]:
    commit, dirty = commit_of(ROOT)
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": describe_device(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "effdet_fast": __version__,
            **{name: version_of(name) for name in ("torchvision", "effdet", "timm")},
        },
        "build": {key: value for info in _libraries.build_info().values() for key, value in (info or {}).items()},
        "commit": commit,
        "uncommitted_changes": dirty,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "command": "python -m benchmarks " + shlex.join(command_line),
    }


def describe_device(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "type": "cuda",
            "name": properties.name,
            "slug": slug(properties.name),
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
        }
    threads = torch.get_num_threads()
    name = f"{cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"
    return {"type": "cpu", "name": name, "slug": slug(name), "cpus": os.cpu_count()}


def cpu_name() -> str:
    try:
        if match := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return re.sub(r"\((R|TM)\)", "", match[1]).strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit_of(root: Path) -> tuple[str | None, bool | None]:
    """The commit, and whether what is built and measured differs from it, new files included.

    Outside a repository EFFDET_FAST_COMMIT can name the commit that was copied there; otherwise both are None.
    """
    try:
        commit = _git(root, "rev-parse", "HEAD").strip()
        return commit, bool(_git(root, "status", "--porcelain", "--", *SOURCES).strip())
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("EFFDET_FAST_COMMIT"), None


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout
