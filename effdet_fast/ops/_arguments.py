"""Checks of arguments that several ops share. Every message names the argument, what it must be, and what it was."""

from collections.abc import Callable, Collection
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch._subclasses import FakeTensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# Labels that are no class.
BACKGROUND = -1
IGNORED = -2

TOO_LARGE = 1 << 63  # for the integers of an op
_dispatch_modes, _dispatch_mode = torch._C._len_torch_dispatch_stack, torch._C._get_dispatch_mode
_Mode = torch._C._TorchDispatchModeKey
_is_functorch_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_Result = TypeVar("_Result")

_debug = False


def set_debug(enabled: bool) -> None:
    """Check the values of tensors on a GPU too, such as labels out of range; each call then waits for the device.

    Values on the CPU are checked without it. Under ``torch.compile`` none are.

    Args:
        enabled: whether to check.
    """
    global _debug
    _debug = bool(enabled)


def device_type(x: Tensor) -> str:
    """`x.device.type`, which makes a device and a string; every call of an op asks for it."""
    return "cpu" if x.is_cpu else "cuda" if x.is_cuda else x.device.type


def may_read_values(x: Tensor) -> bool:
    """Whether a tensor has values that may be looked at without costing a synchronization nobody asked for."""
    if torch.compiler.is_compiling() or not (x.is_cpu or (_debug and not x.is_meta)):
        return False
    # FakeTensorMode, make_fx and vmap call with tensors that stand for others.
    tools = _dispatch_modes() and (_dispatch_mode(_Mode.FAKE) is not None or _dispatch_mode(_Mode.PROXY) is not None)
    return not (tools or _is_functorch_wrapped(x) or (type(x) is not Tensor and isinstance(x, FakeTensor)))


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    """What the ops compute in for a tensor: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensor(op: str, name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(x).__name__}")


def check_floating(op: str, name: str, x: Any) -> None:
    check_tensor(op, name, x)
    if x.dtype not in FLOATING:
        raise TypeError(f"{op}: {name} must be float16, bfloat16, float32 or float64, got {dtype_name(x.dtype)}")


def check_integer(op: str, name: str, x: Any) -> None:
    check_tensor(op, name, x)
    if x.dtype not in INTEGERS:
        raise TypeError(f"{op}: {name} must be an integer tensor, got {dtype_name(x.dtype)}")


def integer(op: str, name: str, value: Any) -> int:
    """The value as a plain int, which NumPy's integers become; symbols stay what they are."""
    plain = plain_integer(value)
    if plain is None:
        raise TypeError(f"{op}: {name} must be {_kind('an int', value)}")
    return plain


def plain_integer(value: Any) -> int | None:
    """As `integer`, but None for what is none: bool, a float, a tensor, more than 64 bits."""
    if type(value) is int:
        return value if -TOO_LARGE <= value < TOO_LARGE else None
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    # torch.jit.trace makes tensors of the sizes of a shape.
    is_size = isinstance(value, Tensor) and torch.jit.is_tracing() and value.dtype == torch.int64 and value.dim() == 0
    return plain_integer(int(value)) if is_size or isinstance(value, np.integer) else None


def number(op: str, name: str, value: Any) -> float:
    """The value as a plain float, which integers and NumPy's scalars become."""
    if type(value) is float:
        return value
    if plain_integer(value) is not None or isinstance(value, float | np.floating | bool | torch.SymFloat):
        return float(value)
    raise TypeError(f"{op}: {name} must be {_kind('a number', value)}")


def number_or_scalar(op: str, name: str, value: Any) -> float | Tensor:
    """As `number`; 0-d tensors are taken too, and symbols stay what they are."""
    if isinstance(value, torch.SymInt | torch.SymFloat):
        return value  # type: ignore[return-value]
    if type(value) is float or not isinstance(value, Tensor):
        return number(op, name, value)
    if value.dim() != 0:
        raise ValueError(f"{op}: {name} must be a number or a 0-d tensor, got shape {list(value.shape)}")
    return value


def _kind(wanted: str, value: Any) -> str:
    if type(value) is int:
        return f"{wanted} of at most 64 bits, got {value}"
    return f"{wanted}, got {type(value).__name__}"


def is_like(x: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a parameter is what it must be in nearly every call; the checks that say what is wrong are for all others."""
    return isinstance(x, Tensor) and x.dtype == dtype and x.shape == shape and x.device == device


def check_same_device(op: str, name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(f"{op}: {name} must be on the device of {other_name}, {other.device}, got {x.device}")


def check_choice(op: str, name: str, value: Any, choices: Collection[Any]) -> None:
    if type(value) is str and value in choices:
        return
    choices = list(choices)  # as what cannot be hashed can be compared
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def remembered(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """Its results are kept: a model calls with the same few shapes over and over.

    Arguments must be plain values, as 1, 1.0 and True are one key. Sizes may be symbols while compiling or tracing; those are
    no keys.
    """
    kept = lru_cache(maxsize=1024)(function)

    def call(*arguments: Any) -> _Result:
        if torch.compiler.is_compiling():
            return function(*arguments)
        try:
            return kept(*arguments)
        except TypeError:
            return function(*arguments)

    return call


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of the autocast region the call is in, for the tensor's device; None outside one."""
    if x.is_meta:  # autocast does not know this device
        return None
    device = device_type(x)
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
