"""Tensors of more than 2^31 elements, on every backend that has kernels; the cases stand in huge_tensors.py."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ops.huge_tensors import CASES

GIGABYTES = 17
MEMORY = Path("/proc/meminfo")


def free_gigabytes(backend: str) -> float:
    if backend == "cuda":
        return torch.cuda.mem_get_info()[0] / 1e9
    lines = MEMORY.read_text().splitlines() if MEMORY.exists() else []
    return next((int(line.split()[1]) / 1e6 for line in lines if line.startswith("MemAvailable:")), 0.0)


# The emulation takes two to six minutes for one of these; for the weight gradient in NCHW it would take two hours.
EMULATED = [
    "focal_loss",
    "depthwise_conv channels_last, one image",
    "batch_norm_act NCHW, one image",
    "squeeze_excite NCHW",
    "fusion_nearest channels_last",
    "fusion_max_pool channels_last, one image",
    "detection_loss NCHW",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "case"),
    [
        *(("cpu", case) for case in CASES),
        *(("emulated", case) for case in EMULATED),
        *(pytest.param("cuda", case, marks=pytest.mark.cuda) for case in CASES),
    ],
)
def test_repeats_what_it_does_to_a_part(backend, case):
    if free_gigabytes(backend) < GIGABYTES:
        pytest.skip(f"needs {GIGABYTES} GB of free memory")
    command = [sys.executable, "-m", "tests.ops.huge_tensors", backend, case]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
