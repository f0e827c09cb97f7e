"""What the emulation knows of blocks that read each other's results."""

import ctypes

import pytest
import torch

from tests.emulation.build import ROOT, build

KERNELS = ROOT / "tests/emulation/between_blocks"


@pytest.fixture(scope="module")
def kernels() -> ctypes.CDLL:
    return ctypes.CDLL(str(build(csrc=KERNELS)))


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


@pytest.mark.parametrize("before, behind", [(True, True), (False, True), (True, False)])
def test_what_blocks_hand_over_is_not_there_without_fences(kernels, before, behind):
    kernels.ef_set_thread_order_seed(1)
    partials, counter, total = torch.full((9,), 7.0), torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    kernels.handover(before, behind, 9, *map(pointer, (partials, counter, total)))
    assert total.item() == 36 if before and behind else total.isnan()
    assert partials.tolist() == list(range(9)), "the next launch sees all"


def test_a_vote_of_a_block(kernels):
    n, y = torch.tensor([0, 1, 0, 70, 33, 0, 0], dtype=torch.int32), torch.full((7,), 5, dtype=torch.int32)
    for seed in range(4):
        kernels.ef_set_thread_order_seed(seed)
        kernels.votes(pointer(n), 7, pointer(y.fill_(5)))
        assert y.tolist() == [0, 1, 0, 1, 1, 0, 0]
