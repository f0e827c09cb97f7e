"""What PyTorch's `FlopCounterMode` counts for the raw ops: the convolutions in them, as PyTorch counts its own.

Importing `torch.utils.flop_counter` imports Triton, which crashes after TensorFlow, so the formulas wait for whoever imports it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

import torch

Shape = Sequence[int]
_COUNTER = "torch.utils.flop_counter"


def _formula_of(op: Any) -> Callable[..., int]:
    return importlib.import_module(_COUNTER).flop_registry[op]


def _options(x: Shape, weight: Shape) -> tuple[Any, ...]:
    """Bias, stride, padding, dilation, transposed, output padding, groups. All that counts is in the shapes."""
    return None, [1, 1], [0, 0], [1, 1], False, [0, 0], x[1] // max(weight[1], 1)


def _forward(x: Shape, weight: Shape, out: Shape) -> int:
    return _formula_of(torch.ops.aten.convolution)(x, weight, *_options(x, weight), out_val=out)


def _backward(grad: Shape, x: Shape, weight: Shape, need_x: bool = False, need_weight: bool = False) -> int:
    formula, needs = _formula_of(torch.ops.aten.convolution_backward), [need_x, need_weight, False]
    return formula(grad, x, weight, *_options(x, weight), needs, out_val=(x, weight, None))


def _depthwise(x: Shape, weight: Shape, *args: Any, out_shape: Shape) -> int:
    return _forward(x, weight, out_shape)


def _depthwise_grad_input(grad: Shape, x: Shape, weight: Shape, *args: Any, out_shape: Shape) -> int:
    return _backward(grad, x, weight, need_x=True)


def _depthwise_grad_weight(grad: Shape, x: Shape, *args: Any, out_shape: Sequence[Shape]) -> int:
    return _backward(grad, x, out_shape[0], need_weight=True)


def _levels(xs: Sequence[Shape], weight: Shape, *args: Any, out_shape: Sequence[Shape]) -> int:
    return sum(_forward(x, weight, out) for x, out in zip(xs, out_shape, strict=True))


def _levels_grad_input(
    grads: Sequence[Shape], xs: Sequence[Shape], weight: Shape, *args: Any, out_shape: Sequence[Shape]
) -> int:
    return sum(_backward(grad, x, weight, need_x=True) for grad, x in zip(grads, xs, strict=True))


def _levels_grad_weight(grads: Sequence[Shape], xs: Sequence[Shape], *args: Any, out_shape: Sequence[Shape]) -> int:
    return sum(_backward(grad, x, out_shape[0], need_weight=True) for grad, x in zip(grads, xs, strict=True))


def _squeeze_excite(x: Shape, reduce_weight: Shape, _: Any, expand_weight: Shape, *args: Any, out_shape: Any) -> int:
    means, reduced = (x[0], x[1], 1, 1), (x[0], reduce_weight[0], 1, 1)
    return _forward(means, reduce_weight, reduced) + _forward(reduced, expand_weight, means)


def _squeeze_excite_backward(
    grad: Shape, x: Shape, reduce_weight: Shape, expand_weight: Shape, kept: Shape, *args: Any, out_shape: Any
) -> int:
    (*_, needs), means, reduced = args, (x[0], x[1], 1, 1), (x[0], reduce_weight[0], 1, 1)
    expand = _backward(means, reduced, expand_weight, need_x=any(needs[:3]), need_weight=needs[3])
    return expand + _backward(reduced, means, reduce_weight, need_x=needs[0], need_weight=needs[1])


FORMULAS: dict[str, Callable[..., int]] = {
    "depthwise_conv": _depthwise,
    "depthwise_conv_grad_input": _depthwise_grad_input,
    "depthwise_conv_grad_weight": _depthwise_grad_weight,
    "depthwise_conv_levels": _levels,
    "depthwise_conv_levels_grad_input": _levels_grad_input,
    "depthwise_conv_levels_grad_weight": _levels_grad_weight,
    "squeeze_excite": _squeeze_excite,
    "squeeze_excite_backward": _squeeze_excite_backward,
}


def _register(counter: ModuleType) -> None:
    for name, formula in FORMULAS.items():
        op = getattr(torch.ops.effdet_fast, name)
        if op not in counter.flop_registry:
            counter.register_flop_formula(op)(formula)


class _Finder(MetaPathFinder):
    """Finds the counter where Python would, with a loader that registers. It stays, for `importlib.reload`."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _register(module)


def register_on_import() -> None:
    """Lets PyTorch's counter know the ops: now if it was imported before, else as soon as someone imports it."""
    sys.meta_path.insert(0, _Finder())
    if _COUNTER in sys.modules:
        _register(importlib.import_module(_COUNTER))  # waits for another thread that is importing it
