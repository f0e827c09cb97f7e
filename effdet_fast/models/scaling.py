"""Compound scaling of EfficientNet and EfficientDet by one coefficient, which may be any number >= 0.

Numbers of layers and image sizes are rounded to the nearest (halves up). The released models follow these rules only in part;
docs/models.md sets both side by side.
"""

from __future__ import annotations

import math
from typing import Any

from effdet_fast.models.backbones.efficientnet import SCALED_PREFIX

EFFICIENTNET_IMAGE_SIZE = 224


def compound_scaling(phi: float) -> dict[str, int]:
    """Scale an EfficientDet by one coefficient (Tan, Pang and Le, arXiv:1911.09070, equations 1 to 3).

    `64 * 1.35^phi` channels, rounded to a multiple of 8; `3 + phi` cells; `3 + floor(phi / 3)` layers in each head; images of
    side `512 + 128 * phi`, a multiple of 128.

    Args:
        phi: Compound coefficient, 0 for D0.

    Returns:
        `fpn_channels`, `fpn_cells`, `head_repeats` and `image_size` (side in pixels), ready for `create_model`.

    Raises:
        ValueError: phi is negative or not finite.
    """
    _check_phi("compound_scaling", phi)
    whole = _nearest(phi)
    return {
        "fpn_channels": 8 * _nearest(64 * 1.35**phi / 8),
        "fpn_cells": 3 + whole,
        "head_repeats": 3 + math.floor(phi / 3),
        "image_size": 512 + 128 * whole,
    }


def scaled_efficientnet(phi: float, alpha: float = 1.2, beta: float = 1.1, gamma: float = 1.15) -> dict[str, Any]:
    """Scale an EfficientNet by one coefficient (Tan and Le, arXiv:1905.11946, equation 3).

    Depth `alpha^phi`, width `beta^phi`, images of side `224 * gamma^phi`, rounded to a multiple of 8. Each step of phi doubles
    the multiply-adds, as `alpha * beta^2 * gamma^2` is about 2.

    Args:
        phi: Compound coefficient, 0 for B0.
        alpha: Base of the depth, >= 1.
        beta: Base of the width, >= 1.
        gamma: Base of the resolution, >= 1.

    Returns:
        `backbone` (a name for `create_backbone`) and `image_size` (side in pixels), ready for `create_model`.

    Raises:
        ValueError: phi is negative or not finite, a base is below 1, or `alpha * beta^2 * gamma^2` is more than 5 % off 2.
    """
    _check_phi("scaled_efficientnet", phi)
    for name, base in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
        if not base >= 1:
            raise ValueError(f"scaled_efficientnet: {name} must be >= 1, got {base}")
    growth = alpha * beta**2 * gamma**2
    if not abs(growth - 2) <= 0.1:
        raise ValueError(f"scaled_efficientnet: alpha * beta^2 * gamma^2 must be within 5 % of 2, got {growth:.3f}")
    return {
        "backbone": f"{SCALED_PREFIX}{beta**phi:.6g},{alpha**phi:.6g}",
        "image_size": 8 * _nearest(EFFICIENTNET_IMAGE_SIZE * gamma**phi / 8),
    }


def _nearest(value: float) -> int:
    return math.floor(value + 0.5)


def _check_phi(caller: str, phi: float) -> None:
    if not isinstance(phi, (int, float)) or not 0 <= phi < math.inf:
        raise ValueError(f"{caller}: phi must be >= 0 and finite, got {phi!r}")
