"""Our models beside effdet's, with the same random weights."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from effdet_fast.models import DetectionModel, create_model

effdet = pytest.importorskip("effdet")


class Pair(NamedTuple):
    """effdet's model and ours, equal weights, in eval mode."""

    peer: Any
    ours: DetectionModel


def randomise(model: nn.Module, image_size: tuple[int, int], seed: int = 0) -> None:
    """Gives every tensor of a model its own random values, keeping activations at a sane scale."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(like.shape, generator=generator)

    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("edge_weights"):
                parameter.copy_(uniform(parameter, 0.1, 1.5))
            elif name == "class_net.predict.conv_pw.bias":
                parameter.copy_(uniform(parameter, -3.0, -1.0))
            elif parameter.dim() == 1:
                parameter.copy_(uniform(parameter, -0.3, 0.3))
        for norm in norms:
            norm.weight.copy_(uniform(norm.weight, 0.6, 1.4))
        # Running statistics as after an epoch that only saw this batch, then blurred so that eval differs from train.
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
        model.train()
        # The coarsest level of small images may be one pixel.
        batch = 4 if max(image_size) < 256 else 1
        model(torch.randn(batch, 3, *image_size, generator=generator))
        model.eval()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.running_mean.add_(uniform(norm.running_mean, -0.1, 0.1))
            # Four samples a channel are few; none may look constant.
            norm.running_var.clamp_(min=float(norm.running_var.mean()))
            norm.running_var.mul_(uniform(norm.running_var, 0.8, 1.25))


def peer_name(name: str) -> str:
    """effdet's name of one of our models."""
    return name.removesuffix("_symmetric") if name.endswith("_symmetric") else f"tf_{name}"


def peer_model(name: str, image_size: tuple[int, int] | None = None, num_classes: int = 90) -> Any:
    config = effdet.get_efficientdet_config(peer_name(name))
    config.num_classes = num_classes
    if image_size is not None:
        config.image_size = image_size
    return effdet.EfficientDet(config, pretrained_backbone=False)


@functools.lru_cache(maxsize=4)
def model_pair(name: str, image_size: tuple[int, int], num_classes: int = 90) -> Pair:
    """Cached between tests: leave weights and statistics as they are, or work on a deepcopy."""
    torch.manual_seed(0)
    peer = peer_model(name, image_size, num_classes)
    randomise(peer, image_size)
    ours = create_model(name, num_classes, image_size=image_size)
    ours.load_state_dict(peer.state_dict())
    return Pair(peer.eval(), ours.eval())
