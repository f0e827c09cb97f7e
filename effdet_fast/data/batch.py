"""The batch that a loader gives, and its normalization on the device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor


class Batch(NamedTuple):
    """The images and objects of one step.

    Attributes:
        images: uint8 [B, 3, H, W] RGB, channels_last in memory.
        gt_boxes: float32 [B, M, 4] xyxy in pixels of `images`; zeros in padding rows. M is a power of two, at least 8,
            so that the number of shapes the model sees stays small.
        gt_labels: int64 [B, M], 0-based; -1 marks padding rows.
        image_ids: int64 [B]; counted from 1 where the annotations file has strings.
        scales: float32 [B], pixels of `images` per original pixel. Nominal: sizes are rounded to whole pixels, so each
            axis may differ a little; `Placement.letterbox(size, image_size).undo_boxes` is exact.
        sizes: int64 [B, 2], original (height, width).
    """

    images: Tensor
    gt_boxes: Tensor
    gt_labels: Tensor
    image_ids: Tensor
    scales: Tensor
    sizes: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """Copy every tensor to a device.

        Args:
            device: where to.
            non_blocking: do not wait for copies from pinned memory.
        """
        return Batch(*(t.to(device, non_blocking=non_blocking) for t in self))


def object_rows(objects: int) -> int:
    """Round a number of objects up to the rows they are padded to: a power of two, at least 8."""
    rows = 8
    while rows < objects:
        rows *= 2
    return rows


def normalize(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
) -> Tensor:
    """Normalize images on their device to `(images / 255 - mean) / std`, without waiting for it.

    Args:
        images: uint8 [B, 3, H, W], RGB.
        mean: RGB mean in 0..1.
        std: RGB standard deviation in 0..1.
        dtype: of the result; the arithmetic is float32.
        channels_last: memory format of the result; False gives contiguous NCHW.

    Returns:
        [B, 3, H, W] of `dtype`.

    Raises:
        TypeError: images are not uint8.
        ValueError: images are not [B, 3, H, W], mean or std are not three numbers, or a std is not positive.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"normalize: images must be uint8, got {images.dtype}")
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"normalize: images must have shape [B, 3, H, W], got {list(images.shape)}")
    # Of a FakeTensor's call nothing is kept: it has no values for the calls after.
    constants = _scale_and_shift.__wrapped__ if isinstance(images, FakeTensor) else _scale_and_shift
    scale, shift = constants(tuple(map(float, mean)), tuple(map(float, std)), images.device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.mul(images, scale).add_(shift).to(dtype=dtype, memory_format=layout)


@lru_cache(maxsize=64)
def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    # Cached because bringing a new constant to a GPU makes the host wait.
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"normalize: mean and std must have 3 values, got {mean} and {std}")
    if min(std) <= 0:
        raise ValueError(f"normalize: std must be positive, got {std}")
    with torch.inference_mode(False):
        scale = torch.tensor([1 / (255 * s) for s in std]).view(1, 3, 1, 1)
        shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(1, 3, 1, 1)
        return scale.to(device), shift.to(device)
