"""The backends. A test that takes the fixture `backend` runs on each of them, through the public functions."""

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from effdet_fast import _libraries, ops
from tests.emulation.backend import emulated

# On a GPU PyTorch's convolutions would round their inputs to 10 bits, peers among them; the tests compare float32.
torch.backends.cudnn.allow_tf32 = False

gpu_lost = False

CUDA = pytest.param("cuda", marks=pytest.mark.cuda)
BACKENDS = ["reference", "cpu", "emulated", CUDA]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(autouse=True)
def _kernels_end_with_their_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """A fault of a kernel is told to whoever waits for the GPU next: here, so that it is not a later test."""
    global gpu_lost
    yield
    if request.node.get_closest_marker("cuda"):
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            gpu_lost = True
            raise


def pytest_runtest_logfinish() -> None:
    """After a fault everything on the GPU fails in this process; pytest-xdist goes on in another."""
    if gpu_lost and "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(1)


@dataclass(frozen=True)
class Backend:
    name: str
    device: torch.device


def enter(name: str) -> Iterator[Backend]:
    if name != "reference":
        assert "cpu" not in _libraries.missing, _libraries.missing
    backend = Backend(name, torch.device("cuda" if name == "cuda" else "cpu"))
    if name == "emulated":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Warning only once for all operators")
            with emulated():
                yield backend
    elif name == "reference":
        with ops.use_reference():
            yield backend
    else:
        yield backend


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every backend in turn: reference, cpu, emulated and, on a machine with a GPU, cuda."""
    yield from enter(request.param)


@pytest.fixture(params=BACKENDS[1:])
def native_backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The backends with kernels of their own: cpu, emulated and cuda."""
    yield from enter(request.param)


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The devices, for opcheck and torch.compile, which see no other backends: cpu and, on a machine with a GPU, cuda."""
    for backend in enter(request.param):
        yield backend.device


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _compile_anew(request: pytest.FixtureRequest) -> None:
    """Of one function torch.compile makes a few versions and no more, whichever tests asked for them."""
    if request.node.get_closest_marker("compiles"):
        torch._dynamo.reset()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests with PyTorch's float64 convolution, which starts its threads anew for every channel."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
