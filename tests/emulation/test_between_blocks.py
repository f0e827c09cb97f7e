"""Blocks that read each other's results: what the emulation knows of them, and csrc/common/last_block.cuh, with a damage that is
noticed for each of its steps."""

import ctypes
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from tests.checks import all_equal
from tests.emulation.backend import emulated, load
from tests.emulation.build import ROOT, build
from tests.emulation.damage import damaged_csrc

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


GROUPS, BLOCKS, THREADS = 3, 5, 32


class Sums:
    """Launches of `sums_kernel`, each with memory of its own."""

    def __init__(self, kernels: ctypes.CDLL) -> None:
        self.kernels = kernels
        kernels.sums.restype = ctypes.c_bool
        kernels.ef_set_thread_order_seed(1)
        self.x = torch.randint(100, (GROUPS, BLOCKS, THREADS)).float()
        self.partials, self.result = torch.full((GROUPS, BLOCKS, THREADS), torch.nan), torch.full((GROUPS,), torch.nan)

    def launch(self, stream: int = 1, capture: int = 0) -> bool:
        """Whether it went well. In a capture it runs by `replay`."""
        self.place = self.kernels.ef_captured_count()
        self.kernels.ef_set_stream(stream)
        self.kernels.ef_set_capture(capture)
        went_well = self.kernels.sums(pointer(self.x), GROUPS, BLOCKS, pointer(self.partials), pointer(self.result))
        self.kernels.ef_set_capture(0)
        return went_well

    def captured(self, capture: int, stream: int = 1) -> "Sums":
        self.launch(stream, capture)
        assert self.result.isnan().all(), "it has not run yet"
        return self

    def replay(self) -> None:
        self.kernels.ef_replay(self.place)

    def is_right(self) -> bool:
        """The result; it is forgotten, that the next one is looked at and not this."""
        right = torch.equal(self.result, self.x.sum((1, 2)))
        self.result.fill_(torch.nan), self.partials.fill_(torch.nan)
        return right


@contextmanager
def after_blocks(kernels, blocks: int, action: Callable[[], object]) -> Iterator[None]:
    """Does `action` in each launch inside, when so many blocks have run. The launch is killed where that returns True."""
    call = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_uint64)(lambda run: run == blocks and action() is True)
    kernels.ef_set_between_blocks(call)
    try:
        yield
    finally:
        kernels.ef_set_between_blocks(None)


def several_in_turn(kernels) -> bool:
    sums = Sums(kernels)
    return all(sums.launch() and sums.is_right() for _ in range(3))


def a_graph_replayed(kernels) -> bool:
    sums = Sums(kernels).captured(capture=1)
    return all(sums.replay() or sums.is_right() for _ in range(3))


def after_a_killed_launch(kernels) -> bool:
    killed = Sums(kernels)
    with after_blocks(kernels, 8, lambda: True):
        assert not killed.launch()
    return several_in_turn(kernels)


def at_once(one: Sums, launch_one: Callable[[], object], other: Sums, launch_other: Callable[[], object]) -> bool:
    with after_blocks(one.kernels, 8, lambda: launch_other() and None):
        launch_one()
    return one.is_right() and other.is_right()


def two_streams_at_once(kernels) -> bool:
    one, other = Sums(kernels), Sums(kernels)
    return at_once(one, lambda: one.launch(stream=1), other, lambda: other.launch(stream=2))


def a_graph_beside_the_stream_of_its_capture(kernels) -> bool:
    eager, graph = Sums(kernels), Sums(kernels).captured(capture=2)
    return at_once(eager, eager.launch, graph, graph.replay)


def two_graphs_of_a_stream_at_once(kernels) -> bool:
    one, other = Sums(kernels).captured(capture=3), Sums(kernels).captured(capture=4)
    return at_once(one, one.replay, other, other.replay)


def two_branches_of_a_graph_at_once(kernels) -> bool:
    one, other = Sums(kernels).captured(capture=5, stream=1), Sums(kernels).captured(capture=5, stream=2)
    return at_once(one, one.replay, other, other.replay)


SITUATIONS = [
    several_in_turn,
    a_graph_replayed,
    after_a_killed_launch,
    two_streams_at_once,
    a_graph_beside_the_stream_of_its_capture,
    two_graphs_of_a_stream_at_once,
    two_branches_of_a_graph_at_once,
]


@pytest.mark.parametrize("situation", SITUATIONS)
def test_the_last_block_finds_all_partials(kernels, situation):
    assert situation(kernels)


# (what is wrong then, the text of last_block.cuh to damage, what it becomes)
DAMAGES = [
    (several_in_turn, "  __threadfence();\n  __syncthreads();", "  __syncthreads();"),
    (several_in_turn, "    __threadfence();\n    if", "    if"),
    (several_in_turn, "== blocks - 1", "== blocks - 2"),
    (a_graph_replayed, "if (is_last) *own = 0;", ""),
    (after_a_killed_launch, "    atomicMax(own, Counter(tickets.launch) << 32);\n", ""),
    (two_streams_at_once, "capture : 0, id}", "capture : 0, 0}"),
    (a_graph_beside_the_stream_of_its_capture, "= status != cudaStreamCaptureStatusNone", "= false"),
    (two_graphs_of_a_stream_at_once, "is_captured ? capture : 0, id}", "0, id}"),
    (two_branches_of_a_graph_at_once, "capture : 0, id}", "capture : 0, 0}"),
]


@pytest.mark.parametrize("situation, sound, damaged", DAMAGES)
def test_a_damaged_step_is_noticed(tmp_path, situation, sound, damaged):
    damaged_csrc(tmp_path, "common/last_block.cuh", sound, damaged)
    copy = tmp_path / KERNELS.relative_to(ROOT)
    shutil.copytree(KERNELS, copy)
    own = os.RTLD_LOCAL | os.RTLD_DEEPBIND  # not the sound functions of another library that the process has
    assert not situation(ctypes.CDLL(str(build(csrc=copy)), own))


def added(rows: torch.Tensor) -> torch.Tensor:
    """In order, in float32."""
    total = torch.zeros(rows.shape[1])
    for row in rows:
        total += row
    return total


@pytest.mark.parametrize("blocks, chunks", [(3, 1), (1, 2), (3, 32), (1, 33), (200, 33), (3, 40), (1, 300)])
def test_chunks_are_added_in_one_order(kernels, blocks, chunks):
    x = torch.randn(chunks, blocks * 32)
    fan = 32 if chunks <= 32 else next(fan for fan in range(16, 320, 16) if fan * fan >= chunks)
    expected = added(torch.stack([added(row) for row in x.split(fan)]))
    for seed in (1, 2):
        partials, sums = torch.full_like(x, torch.nan), torch.full((x.shape[1],), torch.nan)
        kernels.ef_set_thread_order_seed(seed)
        kernels.chunks(pointer(x), blocks, chunks, pointer(partials), pointer(sums))
        assert torch.equal(sums, expected)


@pytest.mark.parametrize("blocks", [1, 2, 127, 128, 129, 5000])
@pytest.mark.parametrize("chunks", [2, 32, 33, 256, 257, 5280, 65535])
def test_a_launch_has_counters_enough(kernels, blocks, chunks):
    of = (ctypes.c_uint * 4)()
    kernels.finish(blocks, chunks, of)
    fan, rows, width, counters = of
    assert fan * (rows - 1) < chunks <= fan * rows and rows <= fan
    assert -(-blocks // width) * (rows + 1) <= counters


def filter_gradient() -> Callable[[], list[torch.Tensor]]:
    x, grad = torch.randn(2, 2, 3, 100, 92).unbind()
    return lambda: torch.ops.effdet_fast.depthwise_conv_grad_weight(grad, x, 3, 1, 1, 1, 0, False, True, False)


OPS = [filter_gradient]


@pytest.mark.parametrize("op", OPS)
def test_calls_on_two_streams_at_once(op):
    one, other = op(), op()
    found: list[object] = []
    controls = load()

    def call(stream: int, run: Callable[[], list[torch.Tensor]]) -> None:
        controls.ef_set_stream(stream)
        found.append(run())

    with emulated():
        expected = [other(), one()]
        with after_blocks(controls, 5, lambda: call(2, other)):
            call(1, one)
    assert all_equal(found, expected)


@pytest.mark.parametrize("op", OPS)
def test_a_call_after_a_killed_one(op):
    run = op()
    with emulated():
        expected = run()
        with after_blocks(load(), 5, lambda: True), pytest.raises(RuntimeError, match="killed"):
            run()
        assert all_equal(run(), expected)
