"""What the emulation knows of blocks that read each other's results."""

import ctypes
from pathlib import Path

import pytest
import torch

from tests.emulation.build import ROOT, build


def library_of(kernels: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(build(csrc=kernels)))


@pytest.fixture(scope="module")
def kernels() -> ctypes.CDLL:
    return library_of(ROOT / "tests/emulation/between_blocks")


def pointer(x: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_kernel_that_relies_on_the_order_of_blocks_is_noticed(kernels, seed):
    y, expected = torch.full((20,), torch.nan), list(range(1, 21))
    kernels.ef_set_thread_order_seed(0)
    kernels.chain(pointer(y), 20)
    assert y.tolist() == expected, "in order it looks right"
    y.fill_(torch.nan)
    kernels.ef_set_thread_order_seed(seed)
    kernels.chain(pointer(y), 20)
    assert y.tolist() != expected
