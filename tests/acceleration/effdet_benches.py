"""effdet's models and benches, small, with their random weights and targets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models.effdet_models import randomise

effdet = pytest.importorskip("effdet")

Size = tuple[int, int]
CLASSES = 7
# A backbone of 80 thousand parameters, one cell and one repeat: what is compared is whole, and quick.
TINY = {"backbone_name": "test_efficientnet", "num_classes": CLASSES, "fpn_cell_repeats": 1, "box_class_repeats": 1}


def model_of(name: str, size: Size, **options: Any) -> Any:
    """effdet's model of a name, any field of its configuration replaced."""
    config = effdet.get_efficientdet_config(name)
    config.image_size = size
    for key, value in options.items():
        config[key] = value
    torch.manual_seed(0)  # for weights that `randomise` leaves
    model = effdet.EfficientDet(config, pretrained_backbone=False)
    randomise(model, size)
    return model.train()


def tiny(name: str = "tf_efficientdet_d0", size: Size = (64, 64), **options: Any) -> Any:
    return model_of(name, size, **{**TINY, **options})


def images(batch: int, size: Size, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def targets(
    batch: int, size: Size, num_classes: int = CLASSES, rows: int = 6, seed: int = 2
) -> dict[str, torch.Tensor]:
    """As effdet's loader gives them: boxes (y1, x1, y2, x2), classes from 1, rows of -1; the second image has no objects."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(batch, rows, 2, generator=generator) * 0.7
    side = 0.05 + torch.rand(batch, rows, 2, generator=generator) * 0.5
    boxes = torch.cat([corner, (corner + side).clamp(max=1)], -1) * torch.tensor([*size, *size])
    classes = torch.randint(1, num_classes + 1, (batch, rows), generator=generator)
    classes[0, rows // 2 :] = -1
    classes[1:2] = -1
    boxes[classes < 0] = -1.0
    height, width = size
    scale = 0.5 + torch.rand(batch, generator=generator)
    sizes = torch.tensor([[width * 0.9, height * 0.8]]).repeat(batch, 1) * scale.unsqueeze(1)
    return {"bbox": boxes, "cls": classes, "img_scale": scale, "img_size": sizes}
