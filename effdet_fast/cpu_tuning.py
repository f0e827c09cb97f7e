"""Tuning of a process that computes on a CPU: what it keeps of freed memory, and how its idle threads wait."""

from __future__ import annotations

import ctypes
import os
import sys

# Turns of a thread of OpenMP that waits, before it gives its core away: by default it spins for milliseconds, also while another
# process wants that core.
SPIN_COUNT = "1000"
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h
_NEVER = -1
# By which a user sets the same.
_MALLOC_VARIABLES = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_"}
_MALLOC_TUNABLES = ("glibc.malloc.trim_threshold", "glibc.malloc.mmap_max", "glibc.malloc.mmap_threshold")


def tune_cpu() -> None:
    """Keep freed memory for later tensors, and let idle threads give their cores away.

    PyTorch allocates new memory for each output. glibc returns a large block to the kernel when it is freed, and the kernel
    zeroes every page of the next one, which takes up to half of a training step. After this call the process keeps freed blocks.
    Training then holds up to a sixth more memory. It can hold several times that where large tensors of one size alternate with
    small ones that stay, as memory between them is left unused; `empty_cache` returns it. Processes forked later inherit this.

    Called before torch is imported, it also sets ``GOMP_SPINCOUNT=1000``: a waiting OpenMP thread soon leaves its core to other
    processes.

    The command line calls this function first. Environment variables of the user win: ``MALLOC_TRIM_THRESHOLD_``,
    ``MALLOC_MMAP_MAX_``, ``MALLOC_MMAP_THRESHOLD_`` and ``GLIBC_TUNABLES`` for the memory, ``GOMP_SPINCOUNT`` and
    ``OMP_WAIT_POLICY`` for the threads. Where the C library is not glibc, memory is left alone.

    Example:
        ```python
        import effdet_fast

        effdet_fast.tune_cpu()  # before torch is imported
        import torch
        ```
    """
    if "torch" not in sys.modules and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT  # read when PyTorch loads OpenMP
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if _MALLOC_VARIABLES & os.environ.keys() or any(name in tunables for name in _MALLOC_TUNABLES):
        return
    if glibc := _glibc():
        # Not M_MMAP_THRESHOLD, which older versions refuse beyond 32 MiB.
        glibc.mallopt(_M_MMAP_MAX, 0)
        glibc.mallopt(_M_TRIM_THRESHOLD, _NEVER)


def empty_cache() -> None:
    """Free the CPU memory that no tensor holds and that is kept for later ones.

    A caching allocator serves the kernels' CPU outputs of 128 KiB and more. It holds at most a quarter more than was ever in use
    at once. After `tune_cpu` the process keeps all other freed memory too. Both are returned to the system. On a GPU call
    ``torch.cuda.empty_cache``.
    """
    import torch

    from effdet_fast import _libraries

    if "cpu" not in _libraries.missing:
        torch.ops.effdet_fast.empty_cache()
    if glibc := _glibc():
        glibc.malloc_trim(ctypes.c_size_t(0))


def _glibc() -> ctypes.CDLL | None:
    """The C library of this process, if it is glibc."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "gnu_get_libc_version") else None
