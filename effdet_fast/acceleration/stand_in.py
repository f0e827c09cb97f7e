"""Puts our functions in place of others'; tools that trace or script a function still see the original."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import _symbolic_trace

_module_call = _symbolic_trace._orig_module_call


def stand_in(original: Callable, ours: Callable) -> Callable:
    """Make a function that runs `ours`, but `original` while `torch.jit.trace` or `torch.fx` records.

    To `torch.jit.script`, which compiles what `inspect` makes of a function, it is the original: source, names and globals.
    """
    is_recording = _is_recording

    def function(*args: Any, **kwargs: Any) -> Any:
        return (original if is_recording() else ours)(*args, **kwargs)

    like_original = types.FunctionType(
        function.__code__, original.__globals__, original.__name__, closure=function.__closure__
    )
    return functools.update_wrapper(like_original, original)


def _is_recording() -> bool:
    # torch.fx exchanges this method while it records; all else takes longer to ask, and this runs in every call.
    return torch.jit.is_tracing() or (nn.Module.__call__ is not _module_call and _is_symbolic())


def _is_symbolic() -> bool:
    """Whether proxies stand for the tensors; `make_fx` records those through the ops that they come to."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return _symbolic_trace.is_fx_symbolic_tracing() and get_proxy_mode() is None
