"""The emulated kernels once more under AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.emulation.build import ROOT, build


def run_sanitized(*arguments: str) -> subprocess.CompletedProcess:
    runtime = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("g++ has no AddressSanitizer")
    environment = os.environ | {
        "LD_PRELOAD": str(Path(runtime).resolve()),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",  # the interpreter itself leaks
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_the_kernels_are_clean():
    done = run_sanitized("-m", "tests.emulation.check", str(build(sanitize=True, only_float32=True)))
    assert done.returncode == 0 and "ERROR" not in done.stderr, done.stdout + done.stderr[-6000:]
