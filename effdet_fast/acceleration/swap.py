"""Replaces an object's class by a subclass with a faster method; giving the class back undoes it.

Nothing else of the object changes: parameters, buffers, hooks, references to it and `isinstance` tests all hold.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, ClassVar

from torch import nn

from effdet_fast._choices import ACTIVATION_MODULES
from effdet_fast.acceleration.stand_in import stand_in

_NAMES_OF_ACTIVATIONS: dict[type, str | None] = {module: name for name, module in ACTIVATION_MODULES.items()}


class Swap:
    """Base of the mixins that override a method of one or more known classes.

    A subclass says which objects it is for (`classes` or `fits`), which of those it leaves alone and why (`reason_against`), and
    overrides the method. It annotates the attributes of the object that it reads; one that lacks any is of an unknown version of
    its class.
    It must not rely on attributes of its own, and goes on to `super()` whenever what it relied on no longer holds, for instance
    after a hook was added to a part it would skip. While `torch.fx` or TorchScript records, it is not called at all.

    Attributes:
        classes: Names, "package.Class", of the classes it is for.
        family: What `accelerate(only=...)` calls it.
        replacement: What the report calls the op.
    """

    classes: ClassVar[tuple[str, ...]] = ()
    family: ClassVar[str]
    replacement: ClassVar[str]

    @classmethod
    def fits(cls, obj: Any) -> bool:
        """Whether the object is a candidate: one that a reader of the report would ask about."""
        return is_one_of(obj, *cls.classes)

    @classmethod
    def reason_against(cls, obj: Any) -> str | None:
        """Why a candidate must stay as it is; None if it need not."""
        return None

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """Pickles and copies by what the class is made of, as nobody could import it by name."""
        original, swaps = parts_of_class(type(self))
        return _new, (original, swaps), self.__dict__


def _new(original: type, swaps: tuple[type[Swap], ...]) -> Any:
    cls = accelerated_class(original, swaps)
    return cls.__new__(cls)  # type: ignore[call-overload]


@functools.cache
def accelerated_class(original: type, swaps: tuple[type[Swap], ...]) -> type:
    """The subclass of `original` with the methods of the swaps; always the same one."""
    names = {
        "__module__": original.__module__,  # tools decide by it what is one of PyTorch's own modules
        "__annotations__": next(filter(None, map(inspect.get_annotations, original.__mro__)), {}),  # for TorchScript
        "_parts": (original, swaps),
    }
    cls = type(f"Accelerated{original.__name__}", (*swaps, original), names)
    for name in {name for kind in cls.__mro__[: cls.__mro__.index(Swap)] for name in vars(kind)}:
        if inspect.isfunction(method := getattr(original, name, None)):
            setattr(cls, name, stand_in(method, getattr(cls, name)))
    return cls


def parts_of_class(cls: type) -> tuple[type, tuple[type[Swap], ...]]:
    """The class before acceleration, and the swaps made."""
    return cls.__dict__.get("_parts", (cls, ()))


def exchange_class(obj: Any, swaps: tuple[type[Swap], ...]) -> None:
    """Gives an object exactly these swaps; none restores it."""
    original, _ = parts_of_class(type(obj))
    object.__setattr__(obj, "__class__", accelerated_class(original, swaps) if swaps else original)


def is_one_of(obj: Any, *names: str) -> bool:
    """Whether the class, before acceleration, is one of "package.Class". Modules move between versions of a package."""
    original, _ = parts_of_class(type(obj))
    return f"{original.__module__.partition('.')[0]}.{original.__name__}" in names


def lacks_attributes(obj: Any, swap: type[Swap]) -> bool:
    """Whether the object has not all that the swap annotates."""
    kinds = swap.__mro__[: swap.__mro__.index(Swap)]
    return not all(hasattr(obj, name) for kind in kinds for name in inspect.get_annotations(kind))


def reason_of_mismatch(obj: Any, name: str, *methods: str) -> str | None:
    """Why these methods of an object are not those of "package.Class"; None if they are, be it by inheritance."""
    original, _ = parts_of_class(type(obj))
    package, _, class_name = name.partition(".")
    for base in original.__mro__:
        if base.__name__ == class_name and base.__module__.partition(".")[0] == package:
            break
    else:
        return f"{original.__name__} is no {class_name}"
    for method in methods:
        if method in getattr(obj, "__dict__", {}) or getattr(original, method) is not getattr(base, method):
            return f"{original.__name__}.{method} is not {package}'s"
    return None


def is_exactly(obj: Any, *classes: type) -> bool:
    """Whether the class, before acceleration, is one of these and no subclass."""
    return parts_of_class(type(obj))[0] in classes


def has_hooks(module: nn.Module) -> bool:
    """Whether something would notice if the module's `forward` were called otherwise, or not at all."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def activation_name(module: nn.Module) -> str | None:
    """ "silu", "relu" or "relu6" of an activation that the ops can take over; None of anything else."""
    return None if has_hooks(module) else _NAMES_OF_ACTIVATIONS.get(type(module))
