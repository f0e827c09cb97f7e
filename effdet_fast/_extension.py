"""Loads the compiled extension, or knows why it is not there."""

import warnings
from typing import Any

import torch  # noqa: F401  (its libraries must be loaded before the extension's)

import_error: str | None = None
try:
    from effdet_fast import _C  # type: ignore[attr-defined]
except (ImportError, OSError) as error:
    _C = None
    import_error = str(error)
    warnings.warn(
        "effdet_fast: the compiled extension is not available, every op runs on its slower reference implementation "
        f"({error}). `effdet-fast doctor` says what to do.",
        RuntimeWarning,
        stacklevel=2,
    )


def build_info() -> dict[str, Any] | None:
    """What was built: compiler, torch version, CPU levels, CUDA version and architectures; None without an extension."""
    return None if _C is None else _C.build_info()


def empty_cache() -> None:
    """Frees the memory of former outputs on the CPU that is kept for later ones.

    Ops with kernels of their own write outputs of 128 KiB and more into memory of former ones, and up to a quarter more than was
    ever in use at once stays with the process. This gives back what no tensor holds. For a GPU there is
    ``torch.cuda.empty_cache``.
    """
    if _C is not None:
        _C.empty_cache()


def native_device_types() -> frozenset[str]:
    """Device types that have compiled kernels."""
    info = build_info()
    if info is None:
        return frozenset()
    return frozenset({"cpu", "cuda"} if info["cuda"] else {"cpu"})
