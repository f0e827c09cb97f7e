"""What a process that computes on a CPU keeps of freed memory, and how its idle threads wait."""

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

    PyTorch takes new memory for each output. glibc gives large blocks back to the kernel when they are freed, and the kernel must
    clear every page of the next one: up to half of a training step. After this call the process keeps them, and a training holds
    up to a sixth more memory. Where large tensors of one size alternate with small ones that stay, the holes between them can
    come to several times that; `empty_cache` gives them back. Processes that are forked later do the same.

    Called before torch is imported, it also sets ``GOMP_SPINCOUNT=1000``, so that threads of OpenMP that wait for each other do
    not hold cores that other processes could use.

    The command line calls it first. What the user has set by environment variables (``MALLOC_TRIM_THRESHOLD_``,
    ``MALLOC_MMAP_MAX_``, ``MALLOC_MMAP_THRESHOLD_``, ``GLIBC_TUNABLES``; ``GOMP_SPINCOUNT``, ``OMP_WAIT_POLICY``) stays, and
    so does memory where the C library is not glibc.
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
    """Give memory of former tensors on the CPU back that is kept for later ones.

    Ops with kernels of their own write outputs of 128 KiB and more into memory of former ones, and up to a quarter more than was
    ever in use at once stays with the process; after `tune_cpu` all other memory stays too. This frees what no tensor holds. For
    a GPU there is ``torch.cuda.empty_cache``.
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
