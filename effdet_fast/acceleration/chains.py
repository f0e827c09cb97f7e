"""Modules that only call their parts one after the other: neighbors among the parts become one op."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from effdet_fast.acceleration.depthwise_conv import DepthwiseConv, convolve, is_depthwise
from effdet_fast.acceleration.swap import Swap, activation_name, has_hooks, is_exactly, is_one_of, parts_of_class
from effdet_fast.nn.batch_norm_act import normalize

# The parts, in the order in which `forward` calls them, of chains that are no `nn.Sequential`.
PARTS = {
    "effdet.ConvBnAct2d": ("conv", "bn", "act"),
    "effdet.SeparableConv2d": ("conv_dw", "conv_pw", "bn", "act"),
    "effdet.Fnode": ("combine", "after_combine"),
}


def parts_of(obj: Any) -> list[nn.Module] | None:
    """The modules that a chain calls one after the other; None of what is no chain."""
    original, _ = parts_of_class(type(obj))
    if issubclass(original, nn.Sequential) and original.forward is nn.Sequential.forward:
        return list(obj._modules.values())
    for name, attributes in PARTS.items():
        if is_one_of(obj, name):
            parts = [getattr(obj, attribute) for attribute in attributes]
            return [part for part in parts if part is not None]
    return None


def leaves(module: nn.Module) -> list[nn.Module]:
    """The module, or for a chain all that it calls; a chain with hooks is called as a whole."""
    parts = None if has_hooks(module) else parts_of(module)
    return [module] if parts is None else leaves_of(parts)


def leaves_of(parts: list[nn.Module]) -> list[nn.Module]:
    return [leaf for part in parts for leaf in leaves(part)]


def norm_then_activation(first: nn.Module, second: nn.Module) -> Callable[[Tensor], Tensor] | None:
    activation = activation_name(second)
    if activation is None or not is_exactly(first, nn.BatchNorm2d) or has_hooks(first):
        return None
    return lambda x: normalize(first, x, activation)  # type: ignore[arg-type]


def activation_then_conv(first: nn.Module, second: nn.Module) -> Callable[[Tensor], Tensor] | None:
    activation = activation_name(first)
    if activation is None or not is_depthwise(second) or has_hooks(second) or DepthwiseConv.reason_against(second):  # type: ignore[arg-type]
        return None
    return lambda x: convolve(second, x, activation)  # type: ignore[arg-type]


class Chain(Swap):
    """Runs a chain's parts, two neighbors as one wherever `fuse` knows how."""

    @staticmethod
    def fuse(first: nn.Module, second: nn.Module) -> Callable[[Tensor], Tensor] | None:
        """What two neighbors do, as one op; None, as here, if it cannot be one."""
        return None

    @classmethod
    def fits(cls, obj: Any) -> bool:
        """Neighbors can be one op that are not already neighbors in one of its parts.

        An activation between two that could take it belongs to the one before it, also where that one is not asked for.
        """
        parts = parts_of(obj)
        return parts is not None and cls._gains(leaves_of(parts)) > sum(cls._gains(leaves(part)) for part in parts)

    @classmethod
    def _gains(cls, modules: list[nn.Module]) -> int:
        return sum(kind is cls for kind, _ in operations(modules, tuple(Chain.__subclasses__())))

    def forward(self, x: Any) -> Any:
        _, swaps = parts_of_class(type(self))
        kinds = tuple(swap for swap in swaps if issubclass(swap, Chain))
        for _, operation in operations(leaves_of(parts_of(self) or []), kinds):
            x = operation(x)
        return x


def operations(
    modules: list[nn.Module], kinds: tuple[type[Chain], ...]
) -> Iterator[tuple[type[Chain] | None, Callable[[Any], Any]]]:
    """What to call, in order: two neighbors as one and the kind that fuses them, or a module."""
    place = 0
    while place < len(modules):
        kind: type[Chain] | None = None
        operation: Callable[[Any], Any] = modules[place]
        # An in-place activation of the chain's own input is seen by whoever gave it.
        if place + 1 < len(modules) and not (place == 0 and getattr(modules[0], "inplace", False)):
            for candidate in kinds:
                fused = candidate.fuse(modules[place], modules[place + 1])
                if fused is not None:
                    kind, operation = candidate, fused
                    break
        yield kind, operation
        place += 1 if kind is None else 2


class NormBeforeActivation(Chain):
    """BatchNorm and activation in one op that keeps nothing but its input."""

    family, replacement = "batch_norm_act", "batch_norm_act"
    fuse = staticmethod(norm_then_activation)


class ActivationBeforeConv(Chain):
    """An activation as the depthwise convolution loads its input."""

    family, replacement = "depthwise_conv", "depthwise_conv2d(prologue=)"
    fuse = staticmethod(activation_then_conv)
