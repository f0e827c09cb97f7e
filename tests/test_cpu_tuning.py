"""What a process keeps of freed memory. In processes of their own: what the C library is told, it never forgets."""

import os
import subprocess
import sys

import pytest

from effdet_fast import cpu_tuning

needs_glibc = pytest.mark.skipif(cpu_tuning._glibc() is None, reason="the C library is not glibc")
MALLOC = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
PAGES = 40 << 8  # of 4 KiB in a tensor of 40 MiB

TRAPS = """
import resource
import torch
import effdet_fast

def traps():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def tensors(count):
    for _ in range(count):
        torch.ones(10 << 20)

TUNE
tensors(10)
before = traps()
tensors(10)
print(traps() - before)
"""


def printed(code: str, variables: dict[str, str] | None = None) -> int:
    kept = {name: value for name, value in os.environ.items() if name not in MALLOC}
    command = [sys.executable, "-c", code]
    return int(subprocess.check_output(command, env=kept | (variables or {}), text=True))


@needs_glibc
def test_the_kernel_clears_no_pages_of_later_tensors():
    assert printed(TRAPS.replace("TUNE", "")) > 5 * PAGES  # so that the next line says something
    assert printed(TRAPS.replace("TUNE", "effdet_fast.tune_cpu()")) < PAGES


@needs_glibc
def test_the_command_line_tunes_its_process():
    main = "from effdet_fast.cli.main import main; import os, sys; sys.stdout = open(os.devnull, 'w'); main([])"
    assert printed(TRAPS.replace("TUNE", f"{main}; sys.stdout = sys.__stdout__")) < PAGES


@needs_glibc
@pytest.mark.parametrize(
    "variables", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"}]
)
def test_what_the_user_has_set_stays(variables):
    assert printed(TRAPS.replace("TUNE", "effdet_fast.tune_cpu()"), variables) > 5 * PAGES


FREED = """
import torch
import effdet_fast
from tests.ops.test_caching_allocator import resident

effdet_fast.tune_cpu()
tensors = [torch.ones(10 << 20) for _ in range(10)]
last = torch.ones(1 << 20)
before = resident()
del tensors
kept = resident()
effdet_fast.empty_cache()
assert (last == 1).all() and before - kept < 20, (before, kept)
print(kept - resident())
"""


@needs_glibc
def test_cached_memory_can_be_freed():
    assert printed(FREED) > 350  # of 400 MiB


def test_nothing_is_done_with_another_c_library(monkeypatch):
    monkeypatch.setattr(cpu_tuning.sys, "platform", "darwin")
    cpu_tuning.tune_cpu()
    cpu_tuning.empty_cache()
