"""The device to run on, and the precision to run in."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line reads AMP_MODES, and imports no PyTorch for --help
    import torch

AMP_MODES = ("none", "bf16", "fp16")


def autocast(device: torch.device, amp: str | torch.dtype | None) -> contextlib.AbstractContextManager:
    """Make the autocast context of a precision.

    Args:
        device: the device whose operations are cast.
        amp: None or "none" (no autocast), "bf16", "fp16", ``torch.bfloat16`` or ``torch.float16``.

    Returns:
        A context manager for the forward pass.

    Raises:
        ValueError: `amp` is anything else.
    """
    import torch

    if amp is None or amp == "none":
        return contextlib.nullcontext()
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = dtypes.get(amp) if isinstance(amp, str) else amp
    if dtype not in dtypes.values():
        raise ValueError(f"amp must be None, 'bf16' or 'fp16', got {amp!r}")
    return torch.autocast(device.type, dtype=dtype)


def choose_device(device: str | torch.device | None, local_rank: int = 0) -> torch.device:
    """Choose the device that was asked for; else the process's GPU; else the CPU.

    Args:
        device: "cpu", "cuda", "cuda:1" or such a device; None takes the GPU if there is one.
        local_rank: Index of this process among those of the machine, and of its GPU.

    Raises:
        ValueError: The name is unknown, or a GPU was asked for where PyTorch sees none.
    """
    import torch

    if device is None:
        return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be like cpu, cuda or cuda:1, got {device!r}") from error
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device {str(device)!r} was asked for, but PyTorch {torch.__version__} sees no GPU")
        chosen = torch.device("cuda", local_rank) if chosen.index is None else chosen
        if chosen.index >= torch.cuda.device_count():
            raise ValueError(f"device cuda:{chosen.index} was asked for, but there are {torch.cuda.device_count()}")
    elif chosen.type != "cpu":
        raise ValueError(f"device must be cpu or cuda, got {str(device)!r}")
    return chosen
