"""Builds the extension anew in a folder of its own and prints the seconds of each file, slowest first.

    python -m benchmarks build             # as setup.py would; EFFDET_FAST_CUDA and TORCH_CUDA_ARCH_LIST choose
    python -m benchmarks build --jobs 1    # one file at a time: the seconds are those of one core, whatever else runs

Compilers run directly, past any ccache.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.environment import ROOT


@dataclass(frozen=True)
class Compiled:
    """One object file."""

    library: str
    source: str
    seconds: float


def read_logs(folder: Path) -> list[Compiled]:
    """What ninja logged below `folder`, slowest first: lines of begin and end in ms, a time stamp, the object, a hash."""
    found = []
    for log in folder.rglob(".ninja_log"):
        for line in log.read_text().splitlines():
            if not line.startswith("#"):
                begin, end, _, path, _ = line.split("\t")
                source = Path(path).relative_to(log.parent).with_suffix("")
                found.append(Compiled(log.parent.name, str(source), (int(end) - int(begin)) / 1000))
    return sorted(found, key=lambda compiled: -compiled.seconds)


def main(command_line: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks build", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="files compiled at a time; default: one per core"
    )
    jobs = parser.parse_args(command_line).jobs
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "setup.py", "build_ext", "--build-temp", folder, "--build-lib", folder]
        environment = {"MAX_JOBS": str(jobs), "CCACHE_DISABLE": "1", "TORCH_NO_COMPILER_WRAPPER": "1"}
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            print(done.stdout[-4000:] + done.stderr[-4000:])
            return done.returncode
        files = read_logs(Path(folder))
    for file in files:
        print(f"{file.seconds:7.1f} s  {file.library:12}  {file.source}")
    total = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{total:7.1f} s  of processor time in all, {jobs} at a time; {done.stdout.strip().splitlines()[-1]}")
    return 0
