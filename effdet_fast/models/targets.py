"""Padding and checks of the objects of a batch, for the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from effdet_fast.ops._arguments import may_read_values

Targets: TypeAlias = tuple[Tensor, Tensor] | Sequence[Mapping[str, Tensor]]


def padded_targets(targets: Targets) -> tuple[Tensor, Tensor]:
    """Pad the objects of a batch with -1 to boxes [B, M, 4] and labels [B, M].

    Args:
        targets: For each image a dict with "boxes" [n, 4] and "labels" [n]; or such a pair, which is returned as it is.

    Raises:
        TypeError: `targets` is neither.
    """
    if isinstance(targets, tuple) and len(targets) == 2 and all(isinstance(each, Tensor) for each in targets):
        return targets  # type: ignore[return-value]
    images = list(targets) if isinstance(targets, Sequence) else [targets]
    if not all(isinstance(each, Mapping) and {"boxes", "labels"} <= each.keys() for each in images):
        raise TypeError(
            "DetectionModel: targets must be a pair (boxes [B, M, 4], labels [B, M]) or a list with a dict of boxes "
            f"[n, 4] and labels [n] for each image, got {type(targets).__name__}"
        )
    if not images:
        return torch.zeros(0, 0, 4), torch.zeros(0, 0, dtype=torch.int64)
    boxes, labels = ([each[key] for each in images] for key in ("boxes", "labels"))  # type: ignore[index]
    return pad_sequence(boxes, True, -1.0), pad_sequence(labels, True, -1)


def check_objects(gt_boxes: Tensor, gt_labels: Tensor, batch: int, num_classes: int) -> None:
    """Raise TypeError or ValueError unless these are padded objects of `batch` images; values are read on the CPU only."""
    if gt_labels.dim() != 2 or gt_labels.shape[0] != batch:
        raise ValueError(f"DetectionModel.loss: gt_labels must have shape [{batch}, M], got {list(gt_labels.shape)}")
    expected = [*gt_labels.shape, 4]
    if list(gt_boxes.shape) != expected:
        raise ValueError(f"DetectionModel.loss: gt_boxes must have shape {expected}, got {list(gt_boxes.shape)}")
    if gt_labels.dtype != torch.int64:
        raise TypeError(f"DetectionModel.loss: gt_labels must be int64, got {gt_labels.dtype}")
    if not gt_boxes.is_floating_point():
        raise TypeError(f"DetectionModel.loss: gt_boxes must be floating point, got {gt_boxes.dtype}")
    if gt_labels.numel() and may_read_values(gt_labels):
        highest = int(gt_labels.max())
        if highest >= num_classes:
            raise ValueError(f"DetectionModel.loss: gt_labels must be below num_classes = {num_classes}, got {highest}")
