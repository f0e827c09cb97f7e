"""What the emulation sees of launches: their configuration, and the memory that warps ask for."""

import ctypes
from functools import partial

import pytest
import torch

from effdet_fast import ops
from tests.emulation.build import ROOT, build
from tests.emulation.observation import Requests as AllRequests
from tests.emulation.observation import observed, recorded

Requests = partial(AllRequests, of_width={})  # which is looked at by itself


@pytest.fixture(scope="module")
def patterns():
    return ctypes.CDLL(str(build(csrc=ROOT / "tests/emulation/observed", observe=True)))


def pointer(x: torch.Tensor) -> ctypes.c_void_p:
    assert x.data_ptr() % 64 == 0
    return ctypes.c_void_p(x.data_ptr())


def one_launch(patterns, name, *arguments):
    with recorded(patterns, 1) as launches:
        getattr(patterns, name)(*arguments)
    (launch,) = launches
    return launch


@pytest.fixture
def x():
    return torch.arange(4096, dtype=torch.float32)


@pytest.fixture
def y():
    return torch.zeros(4096)


@pytest.mark.parametrize("stride, sectors", [(1, 4), (2, 8), (8, 32), (64, 32)])
def test_sectors_of_floats(patterns, x, y, stride, sectors):
    launch = one_launch(patterns, "copy_floats", pointer(x), pointer(y), stride, 1)
    assert launch.loads == Requests(count=1, bytes=128, touched=sectors, least=4)
    assert launch.stores == Requests(1, 128, 4, 4)
    assert launch.shared_loads == launch.shared_stores == Requests(0, 0, 0, 0)
    assert y[:32].tolist() == x[: 32 * stride : stride].tolist()


@pytest.mark.parametrize("first, sectors", [(0, 4), (1, 5), (8, 4)])
def test_a_misaligned_request_takes_a_sector_more(patterns, x, y, first, sectors):
    launch = one_launch(patterns, "copy_floats", ctypes.c_void_p(x.data_ptr() + 4 * first), pointer(y), 1, 1)
    assert launch.loads == Requests(1, 128, sectors, 4)


def test_lanes_that_ask_for_the_same_bytes_count_once(patterns, x, y):
    launch = one_launch(patterns, "copy_floats", pointer(x), pointer(y), 0, 1)
    assert launch.loads == Requests(1, 128, 1, 1)


def test_vectors_stay_whole(patterns, x, y):
    for name in ("copy_four_floats", "copy_eight_halves"):
        launch = one_launch(patterns, name, pointer(x), pointer(y))
        assert launch.loads == launch.stores == Requests(1, 512, 16, 16)
        assert launch.loads.of_width == launch.stores.of_width == {16: 1}


def test_pairs_of_halves_and_lanes_that_do_not_store(patterns, x, y):
    launch = one_launch(patterns, "add_halves", pointer(x), pointer(y))
    assert launch.loads == Requests(1, 128, 4, 4)
    assert launch.stores == Requests(1, 32, 2, 1)
    assert (launch.loads.of_width, launch.stores.of_width) == ({4: 1}, {2: 1})


@pytest.mark.parametrize("width, turns", [(32, 32), (33, 1), (34, 2), (40, 8)])
def test_bank_conflicts(patterns, y, width, turns):
    launch = one_launch(patterns, "transpose", pointer(y), width)
    assert launch.shared_loads == Requests(1, 128, turns, 1)
    assert launch.shared_stores == Requests(32, 32 * 128, 32, 32)


def test_atomics_are_left_out(patterns, y):
    launch = one_launch(patterns, "count_by_atomics", pointer(y))
    assert launch.loads == launch.stores == launch.shared_loads == Requests(0, 0, 0, 0)
    assert launch.shared_stores == Requests(1, 128, 1, 1)


def test_what_blocks_leave_to_others_is_seen_and_their_tickets_are_not(patterns, y):
    for blocks, loads, stores in ((1, 1, 2), (2, 0, 1)):
        with recorded(patterns, 1) as launches:
            patterns.leave_partials(pointer(y), blocks)
        assert launches[0].loads == Requests(loads, loads * 128, loads * 4, loads * 4)
        assert launches[0].stores == Requests(stores, stores * 128, stores * 4, stores * 4)
    patterns.leave_partials(pointer(y), 2)
    assert y[:32].tolist() == list(range(0, 64, 2)), "a launch of which one block ran leaves nothing to the next"


def test_only_blocks_that_were_asked_for_run(patterns):
    x, y = torch.ones(32 * 1000), torch.zeros(32 * 1000)
    with recorded(patterns, 3) as launches:
        patterns.copy_floats(pointer(x), pointer(y), 1, 1000)
        patterns.copy_floats(pointer(x), pointer(y), 1, 2)
    first, second = launches
    assert (first.grid, first.block, first.blocks_run, first.loads.count) == ((1000, 1, 1), (32, 1, 1), 3, 3)
    assert (second.blocks_run, second.stores.count) == (2, 2)
    ran = y.reshape(1000, 32).sum(1).nonzero().flatten().tolist()
    assert ran[:2] == [0, 1]  # the second launch's; the first's have one in each third
    assert len(ran) == 4 and 333 <= ran[2] < 667 <= ran[3]
    patterns.copy_floats(pointer(x), pointer(y), 1, 1000)
    assert y.all(), "all run again"


def test_launches_of_an_operator_without_running_it():
    x = torch.empty(64, 32, 256, 256, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    weight = torch.empty(32, 1, 3, 3, dtype=torch.bfloat16)
    with observed() as launches:
        ops.depthwise_conv2d(x, weight, None, 1, "same")
    (launch,) = launches
    assert "depthwise_conv_kernelILi3ELi1ELi4ELi2ELb0EN3c108BFloat16" in launch.kernel
    # A thread has 2 channels and 4 columns, a block 128 threads; so many run at a time with tiles of all 256 rows.
    assert launch.grid == (64 * 16 * 64 // 128, 1, 1) and launch.block == (128, 1, 1)
    assert (launch.shared_bytes, launch.blocks_run, launch.loads.count) == (32 * 9 * 2, 0, 0)


def test_a_launch_is_told_how_many_blocks_fit():
    asked = []

    def fits(symbol: str, threads: int, shared_bytes: int) -> int:
        asked.append((symbol, threads, shared_bytes))
        return 1 << 20

    x = torch.empty(1, 32, 64, 64).contiguous(memory_format=torch.channels_last)
    with observed(fits=fits) as launches:
        ops.depthwise_conv2d(x, torch.empty(32, 1, 5, 5), None, 1, "same")
    (launch,) = launches
    assert asked == [(launch.kernel, 128, 32 * 25 * 4)]
    assert launch.grid[0] == 16 * 16 * 64 // 4 // 128  # tiles of the fewest rows
