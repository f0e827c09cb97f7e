"""Large outputs on the CPU ask for huge pages: the first write to each small one is a trap into the kernel."""

from pathlib import Path

import pytest
import torch

from effdet_fast.ops import batch_norm_act
from effdet_fast.ops._library import is_native

SMAPS = Path("/proc/self/smaps")


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
def test_large_outputs_ask_for_huge_pages(mebibytes):
    x = torch.zeros(1, 1, 1, mebibytes << 18)
    if not is_native(x):
        pytest.skip("there is no extension")
    y = batch_norm_act(x, torch.zeros(1), torch.ones(1), activation="relu")
    assert "hg" in flags_of(y) and not y.any()
