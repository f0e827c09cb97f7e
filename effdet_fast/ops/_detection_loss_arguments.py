"""Checks of the detection loss's arguments, and its targets brought into one form."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from effdet_fast._choices import BOX_CODERS, BOX_LOSSES, LOSS_NORMALIZERS, MAX_LEVELS
from effdet_fast.ops._arguments import (
    INTEGERS,
    autocast_dtype,
    check_choice,
    check_floating,
    check_same_device,
    check_tensor,
    dtype_name,
    integer,
    is_like,
    number,
)


def concat_labels(labels: Tensor | Sequence[Tensor]) -> Tensor:
    """[B, N] from [B, H, W, A] of each level."""
    return labels if isinstance(labels, Tensor) else torch.cat([level.flatten(1) for level in labels], 1)


def concat_deltas(deltas: Tensor | Sequence[Tensor]) -> Tensor:
    """[B, N, 4] from [B, H, W, A * 4] of each level."""
    if isinstance(deltas, Tensor):
        return deltas
    return torch.cat([level.unflatten(3, (-1, 4)).flatten(1, 3) for level in deltas], 1)


def check_options(op, delta, box_loss_weight, box_loss, normalizer, box_coder) -> tuple[float, float]:
    delta, box_loss_weight = number(op, "delta", delta), number(op, "box_loss_weight", box_loss_weight)
    if not 0 < delta < math.inf:
        raise ValueError(f"{op}: delta must be positive, got {delta}")
    if not 0 <= box_loss_weight < math.inf:
        raise ValueError(f"{op}: box_loss_weight must be >= 0, got {box_loss_weight}")
    check_choice(op, "box_loss", box_loss, BOX_LOSSES)
    check_choice(op, "normalizer", normalizer, LOSS_NORMALIZERS)
    check_choice(op, "box_coder", box_coder, BOX_CODERS)
    return delta, box_loss_weight


def check_num_classes(op: str, num_classes: int) -> int:
    num_classes = integer(op, "num_classes", num_classes)
    if num_classes < 1:
        raise ValueError(f"{op}: num_classes must be at least 1, got {num_classes}")
    return num_classes


def check_outputs(op: str, cls_outputs, box_outputs, num_classes: int) -> tuple[list[Tensor], list[Tensor]]:
    for name, outputs in (("cls_outputs", cls_outputs), ("box_outputs", box_outputs)):
        if not isinstance(outputs, (list, tuple)):
            raise TypeError(f"{op}: {name} must be a list or tuple of tensors, got {type(outputs).__name__}")
    if not 1 <= len(cls_outputs) <= MAX_LEVELS:
        raise ValueError(f"{op}: cls_outputs must be 1 to {MAX_LEVELS} levels, got {len(cls_outputs)}")
    if len(box_outputs) != len(cls_outputs):
        raise ValueError(f"{op}: box_outputs must be {len(cls_outputs)} levels as cls_outputs, got {len(box_outputs)}")
    outputs = [*cls_outputs, *box_outputs]
    first = outputs[0]
    check_floating(op, "cls_outputs[0]", first)
    dtype, device = first.dtype, first.device
    one_dtype = True
    for i, x in enumerate(outputs):
        if isinstance(x, Tensor) and x.dtype == dtype and x.device == device:
            continue
        one_dtype = False
        name = f"cls_outputs[{i}]" if i < len(cls_outputs) else f"box_outputs[{i - len(cls_outputs)}]"
        check_floating(op, name, x)
        check_same_device(op, name, x, "cls_outputs[0]", first)
    shape = first.shape
    if len(shape) != 4 or shape[1] == 0 or shape[1] % num_classes:
        raise ValueError(f"{op}: cls_outputs[0] must have shape [B, A * {num_classes}, H, W], got {list(shape)}")
    batch, channels, _, _ = shape
    box_channels = 4 * (channels // num_classes)
    for i, (cls, box) in enumerate(zip(cls_outputs, box_outputs, strict=True)):
        shape = cls.shape
        if len(shape) != 4 or shape[0] != batch or shape[1] != channels:
            raise ValueError(
                f"{op}: cls_outputs[{i}] must have shape [{batch}, {channels}, H, W], got {list(cls.shape)}"
            )
        if box.shape != (batch, box_channels, shape[2], shape[3]):
            expected = [batch, box_channels, *shape[2:]]
            raise ValueError(f"{op}: box_outputs[{i}] must have shape {expected}, got {list(box.shape)}")
    if not one_dtype:
        outputs = _of_one_dtype(op, outputs)
    return outputs[: len(cls_outputs)], outputs[len(cls_outputs) :]


def _of_one_dtype(op: str, outputs: list[Tensor]) -> list[Tensor]:
    dtypes = {x.dtype for x in outputs}
    if len(dtypes) > 1 and autocast_dtype(outputs[0]) is None:
        found = ", ".join(sorted(map(dtype_name, dtypes)))
        raise TypeError(f"{op}: cls_outputs and box_outputs must have one dtype outside autocast, got {found}")
    widest = outputs[0].dtype
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return [x.to(widest) for x in outputs]


def check_targets(
    op: str, cls_outputs: list[Tensor], cls_targets, box_targets, num_positives, num_classes: int, normalizer: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Labels [B, N] and deltas [B, N, 4] of all levels, and the numbers of positives."""
    first = cls_outputs[0]
    device = first.device
    batch, channels, _, _ = first.shape
    per_cell = channels // num_classes
    shapes = [x.shape for x in cls_outputs]
    count = per_cell * sum([height * width for _, _, height, width in shapes])
    if not (
        is_like(cls_targets, (batch, count), torch.int64, device)
        and is_like(box_targets, (batch, count, 4), torch.float32, device)
        and is_like(num_positives, (batch,), torch.float32, device)
        and not (box_targets.requires_grad or num_positives.requires_grad)
    ):
        sizes = [shape[2:] for shape in shapes]
        _check_target_shapes(op, "cls_targets", cls_targets, (batch, count), sizes, per_cell)
        _check_target_shapes(op, "box_targets", box_targets, (batch, count, 4), sizes, 4 * per_cell)
        cls_targets, box_targets = concat_labels(cls_targets), concat_deltas(box_targets)
        _check_targets(op, first, cls_targets, box_targets, num_positives, normalizer)
    return cls_targets, box_targets, num_positives


def _check_targets(
    op: str, first: Tensor, labels: Tensor, deltas: Tensor, num_positives: Tensor, normalizer: str
) -> None:
    """What `check_targets` did not find at once, asked piece by piece."""
    batch = first.shape[0]
    if labels.dtype not in INTEGERS:
        raise TypeError(f"{op}: cls_targets must be integer, got {dtype_name(labels.dtype)}")
    check_floating(op, "box_targets", deltas)
    check_tensor(op, "num_positives", num_positives)
    if num_positives.shape != (batch,) and not (normalizer == "batch" and num_positives.dim() == 0):
        raise ValueError(f"{op}: num_positives must have shape [{batch}], got {list(num_positives.shape)}")
    for name, x in (("cls_targets", labels), ("box_targets", deltas), ("num_positives", num_positives)):
        check_same_device(op, name, x, "cls_outputs[0]", first)
        if x.requires_grad:
            raise ValueError(f"{op}: {name} must not require a gradient, got a tensor with requires_grad=True")


def _check_target_shapes(op: str, name: str, targets, shape: tuple[int, ...], sizes, channels: int) -> None:
    """Of all levels in one, `shape`; or of each, [B, H, W, channels]."""
    if not isinstance(targets, (list, tuple)):
        check_tensor(op, name, targets)
        if targets.shape != shape:
            raise ValueError(f"{op}: {name} must have shape {list(shape)}, got {list(targets.shape)}")
        return
    for i, level in enumerate(targets):
        check_tensor(op, f"{name}[{i}]", level)
    per_level = [[shape[0], height, width, channels] for height, width in sizes]
    if (got := [list(level.shape) for level in targets]) != per_level:
        raise ValueError(f"{op}: {name} must have shapes {per_level}, got {got}")


def check_anchors(op: str, anchors: Tensor | None, box_loss: str, first: Tensor, count: int) -> None:
    if anchors is None:
        if box_loss == "giou":
            raise ValueError(f"{op}: anchors must be given with box_loss='giou', got None")
        return
    check_floating(op, "anchors", anchors)
    check_same_device(op, "anchors", anchors, "cls_outputs[0]", first)
    if list(anchors.shape) != [count, 4]:
        raise ValueError(f"{op}: anchors must have shape [{count}, 4], got {list(anchors.shape)}")
    if anchors.requires_grad:
        raise ValueError(f"{op}: anchors must not require a gradient, got a tensor with requires_grad=True")


def check_target_values(op: str, labels: Tensor, deltas: Tensor, anchors: Tensor | None, box_loss: str) -> None:
    """Raises ValueError for the first value that the box loss reads and that is not finite, if there is one."""
    # Deltas of background count for "huber" too, unless they are 0.
    counts = True if box_loss == "huber" else (labels >= 0).unsqueeze(2)
    wrong = (~deltas.isfinite() & counts).any(2).nonzero()
    if len(wrong):
        image, anchor = wrong[0].tolist()
        raise ValueError(
            f"{op}: box_targets of image {image}, anchor {anchor} must be finite, got {deltas[image, anchor].tolist()}"
        )
    if box_loss == "giou" and anchors is not None:
        wrong = (~anchors.isfinite().all(1) & (labels >= 0)).nonzero()
        if len(wrong):
            image, anchor = wrong[0].tolist()
            raise ValueError(
                f"{op}: anchors[{anchor}], with an object in image {image}, must be finite, got {anchors[anchor].tolist()}"
            )
