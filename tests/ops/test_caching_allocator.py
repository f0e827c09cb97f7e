"""Memory of outputs on the CPU: kept for later ones; in huge pages where large, as each first write to a small one is a trap."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import effdet_fast
from effdet_fast.ops import batch_norm_act
from effdet_fast.ops._library import is_native

pytestmark = pytest.mark.skipif(not is_native(torch.zeros(1)), reason="there is no extension")
SMAPS = Path("/proc/self/smaps")


def output(mebibytes: float) -> torch.Tensor:
    return output_of(torch.zeros(1, 1, 1, int(mebibytes * 2**18)))


def output_of(x: torch.Tensor) -> torch.Tensor:
    return batch_norm_act(x, torch.zeros(1), torch.ones(1), bias=torch.ones(1), activation="relu")


def forget_others() -> None:
    """Memory that earlier tests left might be as good as what this one frees."""
    gc.collect()
    effdet_fast.empty_cache()


def resident() -> int:
    """MiB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20


def flags_of(x: torch.Tensor) -> list[str]:
    """The kernel's flags of the mapping that holds the first element."""
    inside = False
    for line in SMAPS.read_text().splitlines():
        key, *values = line.split()
        if "-" in key and not key.endswith(":"):
            begin, end = (int(address, 16) for address in key.split("-"))
            inside = begin <= x.data_ptr() + 4096 < end
        elif inside and key == "VmFlags:":
            return values
    raise AssertionError("no mapping holds the tensor")


@pytest.mark.skipif(not SMAPS.exists(), reason="needs Linux")
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the kernel has no huge pages")
@pytest.mark.parametrize("mebibytes", [2, 33])  # in the heap, and mapped for itself
def test_they_ask_for_huge_pages(mebibytes):
    y = output(mebibytes)
    assert "hg" in flags_of(y) and (y == 1).all()


@pytest.mark.parametrize("mebibytes", [0.75, 47])
def test_only_a_freed_one_gives_its_memory_to_the_next(mebibytes):
    forget_others()
    first, second = output(mebibytes), output(mebibytes)
    place = first.data_ptr()
    assert second.data_ptr() != place
    row = first[0, 0]
    del first
    third = output(mebibytes)
    assert third.data_ptr() not in (place, second.data_ptr())  # a view still holds it
    del row
    fourth = output(mebibytes)
    assert fourth.data_ptr() == place
    assert all((y == 1).all() for y in (second, third, fourth))


def test_the_newest_freed_one_comes_first():
    forget_others()
    outputs = [output(5) for _ in range(3)]
    places = [y.data_ptr() for y in outputs]
    while outputs:
        outputs.pop(0)
    outputs = [output(5) for _ in range(3)]
    assert [y.data_ptr() for y in outputs] == places[::-1]


def test_they_can_be_shared_with_other_processes():
    y = output(3).share_memory_()
    assert y.is_shared() and (y == 1).all()


MANY_SIZES = """
from tests.ops.test_caching_allocator import output, resident

output(90)
before = resident()
for mebibytes in range(80, 5, -4):
    output(mebibytes)
print(resident() - before)
"""


@pytest.mark.skipif(not SMAPS.exists(), reason="needs Linux")
def test_no_more_is_kept_than_was_in_use():
    """And a quarter of it: outputs of 800 MiB in all, one after the other, of sizes that do not fit each other's memory."""
    done = subprocess.run([sys.executable, "-c", MANY_SIZES], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 150


FREED = """
import effdet_fast
from tests.ops.test_caching_allocator import output, resident

y = output(90)
output(100)
before = resident()
effdet_fast.empty_cache()
assert (y == 1).all()
print(before - resident())
"""


@pytest.mark.skipif(not SMAPS.exists(), reason="needs Linux")
def test_cached_memory_can_be_freed():
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    assert 90 < int(done.stdout) < 120


WASTED = """
import sys
import torch
from tests.ops.test_caching_allocator import output, output_of, resident

output(1)
x = torch.ones(1, 1, 1, int(float(sys.argv[1]) * 2**18))
before, kept = resident(), [output_of(x) for _ in range(24)]
print(resident() - before)
"""


@pytest.mark.skipif(not SMAPS.exists(), reason="needs Linux")
@pytest.mark.parametrize("mebibytes", [0.51, 2.01, 4.01, 8.01])
def test_a_quarter_more_than_its_size_at_most(mebibytes):
    command = [sys.executable, "-c", WASTED, str(mebibytes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 1.25 * 24 * mebibytes + 2  # what is resident comes in whole MiB
