"""Runs the public ops on the emulated CUDA kernels: for CPU tensors, in place of the CPU kernels."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from effdet_fast.ops import _library
from tests.emulation.build import build

_definitions: torch.library.Library | None = None
_controls: ctypes.CDLL | None = None


def load(library: Path | None = None) -> ctypes.CDLL:
    """Loads the library (built where needed) once, with the schemas it implements; returns its controls.

    A process has one: RuntimeError where another than `library` is loaded.
    """
    global _definitions, _controls
    if _controls is None:
        library = library or build()
        _definitions = torch.library.Library("effdet_fast_emulated", "DEF")
        for schema in _library.SCHEMAS.values():
            _definitions.define(schema)
        torch.ops.load_library(str(library))
        _controls = ctypes.CDLL(str(library))
        _controls.ef_take_guard_violations.restype = ctypes.c_int64
    elif library and _controls._name != str(library):
        raise RuntimeError(f"{_controls._name} is loaded; {library} needs a process of its own")
    return _controls


def _emulated_kernels() -> list[str]:
    names = _library.SCHEMAS
    return [n for n in names if torch._C._dispatch_has_kernel_for_dispatch_key(f"effdet_fast_emulated::{n}", "CPU")]


@contextmanager
def emulated(library: Path | None = None, thread_order_seed: int = 1) -> Iterator[None]:
    """Inside, `torch.ops.effdet_fast.*` runs the CUDA sources on CPU tensors. Fails if they wrote out of bounds."""
    controls = load(library)
    controls.ef_set_thread_order_seed(thread_order_seed)
    override = torch.library.Library("effdet_fast", "IMPL")
    for name in _emulated_kernels():
        override.impl(name, getattr(torch.ops.effdet_fast_emulated, name).default, "CPU", allow_override=True)
    try:
        yield
    finally:
        override._destroy()
    assert controls.ef_take_guard_violations() == 0, "an emulated kernel wrote outside its buffers"
