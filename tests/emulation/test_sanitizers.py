"""The kernels once more under AddressSanitizer and UndefinedBehaviorSanitizer: the emulated ones, and the CPU's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.emulation.build import ROOT, build


def run_sanitized(*arguments: str) -> subprocess.CompletedProcess:
    # The sanitizer looks up how C++ throws as it is loaded; Python does not bring that.
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not all(Path(runtime).is_absolute() for runtime in runtimes):
        pytest.skip("g++ has no AddressSanitizer")
    environment = os.environ | {
        "LD_PRELOAD": " ".join(str(Path(runtime).resolve()) for runtime in runtimes),
        # The interpreter itself leaks. What cannot be allocated is an exception here as elsewhere.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module", params=["emulated", "cpu"])
def library(request: pytest.FixtureRequest) -> str:
    return str(build(sanitize=True, only_float32=True, cpu=request.param == "cpu"))


@pytest.mark.slow
def test_the_kernels_are_clean(library):
    done = run_sanitized("-m", "tests.emulation.check", library)
    assert done.returncode == 0 and "ERROR" not in done.stderr, done.stdout + done.stderr[-6000:]


@pytest.mark.slow
def test_raw_ops_stay_inside_of_what_they_are_handed(library):
    done = run_sanitized("-m", "tests.ops.raw_ops", "emulated", "20000", "--library", library, "--only-float32")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
