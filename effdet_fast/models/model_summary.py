"""The size of a detector: parameters, multiply-adds, activations and anchors, part by part, counted without computing."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from effdet_fast.models.anchors import AnchorCache
from effdet_fast.models.detection_model import DetectionModel

# What a part is called, and the submodule of a `DetectionModel` that it is.
PARTS = {"backbone": "backbone", "neck": "fpn", "class head": "class_net", "box head": "box_net"}


@dataclass(frozen=True)
class PartSummary:
    """One part of a detector, or all of it.

    Attributes:
        name: "backbone", "neck", "class head", "box head" or "total".
        parameters: Values that training may change; statistics and frozen BatchNorms are buffers and do not count.
        multiply_adds: Multiply-adds of all convolutions and matrix products for one image. BatchNorms, activations, fusions and
            poolings do not count.
        activations: Number of output values of those convolutions and products for one image. The EfficientDet paper's FLOPs
            are `multiply_adds + activations`.
    """

    name: str
    parameters: int
    multiply_adds: int
    activations: int


@dataclass(frozen=True)
class LevelSummary:
    """One level of the pyramid, of stride 2^level.

    Attributes:
        level: Its number; 3 is P3.
        height: Of the feature map.
        width: Of the feature map.
        anchors: Number of anchors on it.
    """

    level: int
    height: int
    width: int
    anchors: int


@dataclass(frozen=True)
class ModelSummary:
    """The size of a detector, as `summary` counts it; `str()` gives two tables.

    Attributes:
        name: The configuration's name.
        num_classes: Number of object classes.
        image_size: Input (height, width) in pixels.
        parts: Backbone, neck, class head and box head.
        levels: The pyramid, finest first.
    """

    name: str
    num_classes: int
    image_size: tuple[int, int]
    parts: tuple[PartSummary, ...]
    levels: tuple[LevelSummary, ...]

    @property
    def total(self) -> PartSummary:
        """The sums over all parts."""
        return PartSummary(
            "total",
            sum(part.parameters for part in self.parts),
            sum(part.multiply_adds for part in self.parts),
            sum(part.activations for part in self.parts),
        )

    @property
    def anchors(self) -> int:
        """Number of anchors on all levels."""
        return sum(level.anchors for level in self.levels)

    def __str__(self) -> str:
        height, width = self.image_size
        lines = [f"{self.name}, {self.num_classes} classes, one image of {height} x {width}", ""]
        lines.append(f"{'part':<10} {'parameters':>12} {'multiply-adds':>16} {'activations':>13}")
        lines += [
            f"{part.name:<10} {part.parameters:>12,} {part.multiply_adds:>16,} {part.activations:>13,}"
            for part in (*self.parts, self.total)
        ]
        lines += ["", f"{'level':<10} {'stride':>12} {'features':>16} {'anchors':>13}"]
        lines += [
            f"{'P' + str(level.level):<10} {2**level.level:>12} "
            f"{f'{level.height} x {level.width}':>16} {level.anchors:>13,}"
            for level in self.levels
        ]
        lines.append(f"{'total':<10} {'':>12} {'':>16} {self.anchors:>13,}")
        return "\n".join(lines)


class _Counter(TorchDispatchMode):
    """Adds up, by part, what the convolutions and matrix products under it do."""

    def __init__(self) -> None:
        super().__init__()
        # Imports Triton, which is slow and crashes in a process that holds TensorFlow: only for whoever counts.
        from torch.utils.flop_counter import flop_registry

        self.formulas = flop_registry
        self.part = ""
        self.multiply_adds = dict.fromkeys(PARTS, 0)
        self.activations = dict.fromkeys(PARTS, 0)

    def enter(self, part: str) -> Any:
        """A forward pre-hook that books what follows under a part."""

        def hook(module: nn.Module, inputs: Any) -> None:
            self.part = part

        return hook

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        formula = self.formulas.get(func.overloadpacket)
        if formula is not None:
            # The formulas of PyTorch count a multiplication and its addition as two.
            self.multiply_adds[self.part] += formula(*args, **(kwargs or {}), out_val=output) // 2
            self.activations[self.part] += output.numel()
        return output


def summary(model: DetectionModel) -> ModelSummary:
    """Count a detector's parameters, multiply-adds, activations and anchors.

    Nothing is computed: a copy on device "meta" runs on shapes alone, so that the largest model takes seconds. The model itself
    stays as it is.

    Args:
        model: A `DetectionModel`, on any device ("meta" too), in either mode.

    Returns:
        A `ModelSummary`; print it.
    """
    config = model.config
    shell = _without_memory(model).eval()
    counter = _Counter()
    for name, attribute in PARTS.items():
        shell.get_submodule(attribute).register_forward_pre_hook(counter.enter(name))
    with torch.no_grad(), counter:
        shell(torch.empty(1, 3, *config.image_size, device="meta"))
    parts = (
        PartSummary(
            name,
            sum(parameter.numel() for parameter in model.get_submodule(attribute).parameters()),
            counter.multiply_adds[name],
            counter.activations[name],
        )
        for name, attribute in PARTS.items()
    )
    anchors = AnchorCache(config)
    levels = (
        LevelSummary(config.min_level + index, height, width, count)
        for index, ((height, width), count) in enumerate(zip(anchors.sizes, anchors.counts, strict=True))
    )
    return ModelSummary(config.name, config.num_classes, config.image_size, tuple(parts), tuple(levels))


def _without_memory(model: DetectionModel) -> DetectionModel:
    """A copy in float32 whose tensors have shapes but no values."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(_shape_of(parameter), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = _shape_of(buffer)
    return copy.deepcopy(model, memo)


def _shape_of(tensor: torch.Tensor) -> torch.Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return torch.empty(tensor.shape, dtype=dtype, device="meta")
