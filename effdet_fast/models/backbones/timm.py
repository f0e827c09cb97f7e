"""Any model of timm that gives feature maps of stride 8, 16 and 32, as a backbone."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import nn

PREFIX = "timm:"
STRIDES = (8, 16, 32)


def timm_backbone(
    name: str, image_size: tuple[int, int], batch_norm_eps: float | None = None, frozen_batch_norm: bool = False
) -> nn.Module:
    """Build the feature extractor of a timm model, with new weights and timm's state-dict keys.

    Args:
        name: timm's name of the model.
        image_size: (height, width) of the images it will get.
        batch_norm_eps: eps of its BatchNorms; None leaves the model's own.
        frozen_batch_norm: Make its BatchNorms constants.

    Returns:
        A module that turns images [B, 3, H, W] into [C3, C4, C5], with their widths in `feature_channels`.

    Raises:
        ValueError: timm is not installed or has no such model, or the model gives no maps of stride 8, 16 and 32, with sides
            rounded up, for these images.
    """
    try:
        import timm
        from timm.layers import freeze_batch_norm_2d
    except ImportError as error:
        raise ValueError(f"timm_backbone: {PREFIX}{name} needs `pip install effdet_fast[timm]`") from error
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=8)
        raise ValueError(f"timm_backbone: timm has no model {name!r}; timm.list_models() lists them, close are {close}")
    channels, indices = _feature_maps(timm, name, image_size)
    backbone = timm.create_model(name, features_only=True, out_indices=indices)
    backbone.feature_channels = channels  # type: ignore[assignment]
    if batch_norm_eps is not None:
        for module in backbone.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eps = batch_norm_eps
    return freeze_batch_norm_2d(backbone) if frozen_batch_norm else backbone


def _feature_maps(timm: Any, name: str, image_size: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Channels and timm's indices of the maps, found by running the model without memory or arithmetic."""
    expected = {stride: tuple(-(-side // stride) for side in image_size) for stride in STRIDES}
    with torch.device("meta"):
        try:
            model = timm.create_model(name, features_only=True).eval()
            strides, numbers = model.feature_info.reduction(), model.feature_info.out_indices
            maps = model(torch.zeros(1, 3, *image_size))
        except Exception as error:  # each of timm's models says in its own way what it cannot do
            raise ValueError(f"timm_backbone: {name} gives no feature maps of {image_size} images: {error}") from error
    # Where several maps have one stride, the last.
    indices = {stride: index for index, stride in enumerate(strides)}
    sizes = {stride: tuple(maps[index].shape[2:]) for stride, index in indices.items()}
    if {stride: sizes.get(stride) for stride in STRIDES} != expected:
        raise ValueError(
            f"timm_backbone: {name} must have maps of strides and sizes {expected} for {image_size} images, got {sizes}"
        )
    chosen = [indices[stride] for stride in STRIDES]
    # timm's numbers need not begin at 0: DLA leaves out its map of stride 1.
    return tuple(maps[index].shape[1] for index in chosen), tuple(numbers[index] for index in chosen)
