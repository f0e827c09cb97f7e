"""effdet's weighted fusion of a pyramid node: resampling, weights, sum and the activation after it in one op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effdet_fast.acceleration.chains import Chain, leaves_of, parts_of
from effdet_fast.acceleration.swap import Swap, activation_name, has_hooks, is_one_of
from effdet_fast.ops._arguments import autocast_dtype
from effdet_fast.ops.fusion import weighted_fusion

METHODS = {"fastattn": "fast", "attn": "softmax", "sum": "sum"}


class Resampling(NamedTuple):
    """How an input comes to the node's size: by modules, and by what the op does after them."""

    before: list[nn.Module]
    inside: str = "none"
    size: tuple[int, int] | None = None


def resampling_of(module: nn.Module) -> Resampling:
    """The same for an effdet `ResampleFeatureMap`; one with hooks is called as a whole."""
    if has_hooks(module):
        return Resampling([module])
    parts: list[Any] = list(module._modules.values())
    last = parts[-1] if parts else None
    if last is None or has_hooks(last):
        return Resampling(parts)
    if is_one_of(last, "timm.MaxPool2dSame") and _pools_by_two(last):
        return Resampling(parts[:-1], "max_pool")
    if is_one_of(last, "effdet.Interpolate2d") and last.mode == "nearest" and last.size and _doubles(module):
        return Resampling(parts[:-1], "nearest", (last.size[0], last.size[1]))
    return Resampling(parts)


def _pools_by_two(pool: Any) -> bool:
    options = (pool.kernel_size, pool.stride, pool.dilation, pool.ceil_mode, pool.return_indices)
    return options == ((3, 3), (2, 2), (1, 1), False, False)


def _doubles(resample: Any) -> bool:
    """Beyond a factor of 2, PyTorch's source pixel is at times one off from the op's, as it multiplies by a rounded quotient."""
    sides = zip(resample.input_size, resample.output_size, strict=True)
    return all(small in (large, (large + 1) // 2) for small, large in sides)


def _keeps_size(resample: Any) -> bool:
    return getattr(resample, "input_size", None) == getattr(resample, "output_size", None)


class FpnCombine(Swap):
    """`FpnCombine` in one op; 1x1 convolutions and their BatchNorms stay modules."""

    family = "fusion"
    weight_method: str
    inputs_offsets: tuple[int, ...]
    resample: nn.ModuleDict
    edge_weights: nn.Parameter | None

    @classmethod
    def reason_against(cls, obj: Any) -> str | None:
        count = len(obj.inputs_offsets)
        if not all(hasattr(module, "input_size") for module in obj.resample.values()):
            return "an unknown version of it"
        if obj.weight_method not in METHODS:
            return f"weight_method {obj.weight_method!r}"
        if not 2 <= count <= 4:
            return f"{count} input{'s' if count > 1 else ''}"
        if len(obj.resample) != count:
            return "the same input twice"
        return None

    def forward(self, x: list[Tensor]) -> Tensor:
        if FpnCombine.reason_against(self):
            return super().forward(x)  # type: ignore[misc]
        return fuse(self, x)


class FusionOfAll(FpnCombine):
    """One whose inputs all are resampled inside the op."""

    replacement = "weighted_fusion(resample=)"

    @classmethod
    def fits(cls, obj: Any) -> bool:
        return _is_new(obj) and _resamples_inside(obj)


class FusionOfResampled(FpnCombine):
    """One with an input that the op cannot resample, as bilinearly: its module does so before."""

    replacement = "weighted_fusion, resampled before"

    @classmethod
    def fits(cls, obj: Any) -> bool:
        return _is_new(obj) and not _resamples_inside(obj)


def _is_new(obj: Any) -> bool:
    """Hooks come and go, and with them what happens inside; one that was swapped looks at them by itself."""
    return is_one_of(obj, "effdet.FpnCombine") and not isinstance(obj, FpnCombine)


def _resamples_inside(obj: Any) -> bool:
    return all(_keeps_size(module) or resampling_of(module).inside != "none" for module in obj.resample.values())


def fuse(node: Any, features: Sequence[Tensor], activation: str | None = None) -> Tensor:
    """What `FpnCombine` makes of all features so far, and an activation after it.

    The dtype is that of effdet's own result; with an activation that of the inputs, to which a convolution under autocast would
    round what comes after.
    """
    inputs, inside, size = [], [], None
    for offset, module in zip(node.inputs_offsets, node.resample.values(), strict=True):
        resampling, x = resampling_of(module), features[offset]
        for part in resampling.before:
            x = part(x)
        inputs.append(x)
        inside.append(resampling.inside)
        size = resampling.size or size
    dtype = reduce(torch.promote_types, [x.dtype for x in inputs])
    method = METHODS[node.weight_method]
    y = weighted_fusion(
        [x.to(dtype) for x in inputs],
        node.edge_weights,
        method=method,
        resample=inside,
        size=size,
        activation=activation,
    )
    if activation is not None:
        return y
    if method == "softmax":  # of weights cast to the dtype of the first feature
        dtype = torch.promote_types(dtype, features[0].dtype)
    if autocast_dtype(y) is not None and y.device.type != "cpu":  # there, autocast sums in float32
        dtype = torch.promote_types(dtype, torch.float32)
    return y.to(dtype)


def fusion_then_activation(first: nn.Module, second: nn.Module) -> Callable[[Any], Tensor] | None:
    activation = activation_name(second)
    if activation is None or not is_one_of(first, "effdet.FpnCombine") or has_hooks(first):
        return None
    if FpnCombine.reason_against(first):
        return None
    return lambda features: fuse(first, features, activation)


class ActivationAfterFusion(Chain):
    """`Fnode`: the activation of the fused sum before it is stored."""

    family, replacement = "fusion", "weighted_fusion(activation=)"
    fuse = staticmethod(fusion_then_activation)

    @classmethod
    def fits(cls, obj: Any) -> bool:
        return super().fits(obj) and isinstance(leaves_of(parts_of(obj) or [])[2], nn.Conv2d)
