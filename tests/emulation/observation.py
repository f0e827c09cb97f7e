"""Which kernels the public ops launch, and how: read from the launch itself, by the emulation, without a GPU.

Tensors may be as large as a GPU's: only blocks that are asked for run, and memory that nobody writes is never mapped.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.emulation.backend import emulated, load


@dataclass(frozen=True)
class Requests:
    """Accesses of a warp's threads by one instruction, of one kind.

    count: how many; bytes: what the threads ask for. touched: sectors of 32 bytes of global memory, or turns that shared memory
    takes; least: the fewest in which as many different bytes fit. of_width: how many by the bytes of a thread.
    """

    count: int
    bytes: int
    touched: int
    least: int
    of_width: dict[int, int] = field(compare=False)


@dataclass(frozen=True)
class Launch:
    """A kernel's launch.

    kernel: the symbol of g++, which may differ from nvcc's in the types of its parameters: `c++filt -p` makes both the same.
    grid, block: x, y, z. shared_bytes: dynamic shared memory of a block. blocks_run: how many of the grid's blocks ran; their
    requests follow, atomics left out, and only of a library that was built to observe them.
    """

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    blocks_run: int
    loads: Requests
    stores: Requests
    shared_loads: Requests
    shared_stores: Requests


# How many blocks of a kernel, by its symbol, fit on a multiprocessor with so many threads and bytes of shared memory.
Fits = Callable[[str, int, int], int]
_Fits = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_char_p, ctypes.c_int64, ctypes.c_uint64)


class _Requests(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("count", "bytes", "touched", "least")]
    _fields_ += [("of_width", ctypes.c_uint64 * 5)]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_char_p),
        ("grid", ctypes.c_uint64 * 3),
        ("block", ctypes.c_uint64 * 3),
        ("shared_bytes", ctypes.c_uint64),
        ("blocks_run", ctypes.c_uint64),
        ("requests", _Requests * 4),
    ]


@contextmanager
def observed(blocks: int = 0, library: Path | None = None, fits: Fits | None = None) -> Iterator[list[Launch]]:
    """Inside, `torch.ops.effdet_fast.*` launches its CUDA kernels for CPU tensors, of which `blocks` blocks run, spread over the
    grid. Results are garbage: zeros where no block wrote. The list is filled when the context is left. Launches that ask how
    many blocks fit hear what `fits` says."""
    with emulated(library), recorded(load(library), blocks, fits) as launches:
        yield launches


@contextmanager
def recorded(controls: ctypes.CDLL, blocks: int, fits: Fits | None = None) -> Iterator[list[Launch]]:
    """The launches of this emulated library."""
    controls.ef_launches.restype = ctypes.POINTER(_Launch)
    controls.ef_launch_count.restype = ctypes.c_uint64
    launches: list[Launch] = []
    said = _Fits(lambda symbol, threads, shared: fits(symbol.decode(), threads, shared)) if fits else _Fits()
    controls.ef_set_blocks_that_fit(said)
    controls.ef_observe(ctypes.c_int64(blocks))
    try:
        yield launches
    finally:
        launches += [_launch(one) for one in controls.ef_launches()[: controls.ef_launch_count()]]
        controls.ef_observe(ctypes.c_int64(-1))
        controls.ef_set_blocks_that_fit(_Fits())


def _launch(one: _Launch) -> Launch:
    requests = [
        Requests(
            of.count, of.bytes, of.touched, of.least, {1 << i: count for i, count in enumerate(of.of_width) if count}
        )
        for of in one.requests
    ]
    return Launch(one.kernel.decode(), tuple(one.grid), tuple(one.block), one.shared_bytes, one.blocks_run, *requests)
