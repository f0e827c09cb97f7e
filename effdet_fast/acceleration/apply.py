"""`accelerate(model)` makes an existing model of effdet, timm or torchvision run on our operators; `restore(model)` undoes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from effdet_fast.acceleration.chains import ActivationBeforeConv, NormBeforeActivation
from effdet_fast.acceleration.depthwise_conv import DepthwiseConv
from effdet_fast.acceleration.effdet_bench import PredictBench, TrainBench
from effdet_fast.acceleration.effdet_fusion import ActivationAfterFusion, FusionOfAll, FusionOfResampled
from effdet_fast.acceleration.effdet_head import NormsOfHead
from effdet_fast.acceleration.effdet_labeler import AnchorLabeler
from effdet_fast.acceleration.effdet_loss import DetectionLoss
from effdet_fast.acceleration.norms import NormAct
from effdet_fast.acceleration.report import Report, Row
from effdet_fast.acceleration.retinanet import RetinaNetClassLoss, RetinaNetDetections, RetinaNetLoss
from effdet_fast.acceleration.squeeze_excite import SqueezeExcite
from effdet_fast.acceleration.swap import Swap, exchange_class, lacks_attributes, parts_of_class

SWAPS: tuple[type[Swap], ...] = (
    DepthwiseConv,
    NormAct,
    NormBeforeActivation,
    ActivationBeforeConv,
    SqueezeExcite,
    FusionOfAll,
    FusionOfResampled,
    ActivationAfterFusion,
    NormsOfHead,
    AnchorLabeler,
    DetectionLoss,
    PredictBench,
    TrainBench,
    RetinaNetLoss,
    RetinaNetClassLoss,
    RetinaNetDetections,
)
FAMILIES = tuple(dict.fromkeys(swap.family for swap in SWAPS))
"""The families of modules that `accelerate` can swap, by the names that its argument `only` takes."""


def accelerate(model: nn.Module, *, only: Sequence[str] | None = None) -> Report:
    """Make the modules of a model that are known run on this package's operators, in place.

    Parameters, buffers, state-dict keys and their order, hooks, `isinstance` and references to modules stay as they are, so that
    optimizers, checkpoints, DDP, EMA copies, pickles, AMP and `torch.compile` go on working. `torch.fx`, `torch.jit.trace` and
    `torch.jit.script` see the original. Results are the same up to the round-off of float32. A second call adds to the first.

    Args:
        model: A model of effdet, timm or torchvision, or any module that holds one: a bench, DDP, `torch.compile`'s wrapper.
        only: Families to swap, of `FAMILIES`; None swaps all.

    Returns:
        The `Report`; print it. It lists each module that was swapped, and each that was left alone with the reason.

    Raises:
        TypeError: `model` is not a module, or `only` is a string.
        ValueError: `only` has an unknown family.

    Example:
        ```python
        bench = effdet.create_model("tf_efficientdet_d0", bench_task="train", bench_labeler=True, pretrained_backbone=False)
        print(effdet_fast.accelerate(bench))
        ```
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be an nn.Module, got {type(model).__name__}")
    if isinstance(only, str):
        raise TypeError(f"accelerate: only must be a sequence of families, got the string {only!r}")
    if unknown := sorted(set(only or ()) - set(FAMILIES)):
        raise ValueError(f"accelerate: only must name families of {list(FAMILIES)}, got {unknown}")
    rows = []
    for path, obj in _objects(model):
        original, done = parts_of_class(type(obj))
        wanted = [s for s in SWAPS if (only is None or s.family in only) and s not in done and s.fits(obj)]
        found = [(swap, _reason_against(swap, obj)) for swap in wanted]
        rows += [
            Row(path, original.__name__, swap.family, None if reason else swap.replacement, reason)
            for swap, reason in found
        ]
        if new := tuple(swap for swap, reason in found if reason is None):
            exchange_class(obj, tuple(swap for swap in SWAPS if swap in (*done, *new)))
    return Report(tuple(rows))


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate` exactly; a model that was never accelerated stays as it is.

    Args:
        model: The model, which is changed in place.

    Returns:
        The model.

    Raises:
        TypeError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore: model must be an nn.Module, got {type(model).__name__}")
    for _, obj in _objects(model):
        if parts_of_class(type(obj))[1]:
            exchange_class(obj, ())
    return model


def _objects(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Iterate over all modules with their paths, and over effdet's labelers, which are no modules."""
    for path, module in model.named_modules():
        yield path, module
        labeler = module.__dict__.get("anchor_labeler")
        if labeler is not None and not isinstance(labeler, nn.Module):
            yield f"{path}.anchor_labeler".lstrip("."), labeler


def _reason_against(swap: type[Swap], obj: Any) -> str | None:
    if isinstance(obj, torch.jit.ScriptModule):
        return "compiled by TorchScript"
    if isinstance(obj, nn.Module) and "forward" in obj.__dict__:
        return "its forward was replaced"
    if lacks_attributes(obj, swap):
        return "an unknown version of it"
    return swap.reason_against(obj)
