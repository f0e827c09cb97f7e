"""Our RetinaNets beside torchvision's, with the same random weights."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead, _default_anchorgen
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.ops.misc import FrozenBatchNorm2d

from effdet_fast.models import DetectionModel, create_model, model_config

HEADS = {"class_net": ("classification_head", "cls_logits"), "box_net": ("regression_head", "bbox_reg")}


class Pair(NamedTuple):
    """torchvision's model and ours, equal weights, in eval mode."""

    peer: Any
    ours: DetectionModel


def peer_model(name: str, image_size: tuple[int, int], num_classes: int = 91) -> RetinaNet:
    """torchvision's RetinaNet of one of our names; it takes images as ours do, normalized and of this size."""
    second = name.endswith("_v2")
    depth = int(name.split("_")[1].removeprefix("resnet"))
    backbone = resnet_fpn_backbone(
        backbone_name=f"resnet{depth}",
        weights=None,
        norm_layer=nn.BatchNorm2d if second else FrozenBatchNorm2d,
        trainable_layers=5,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7((2048 if depth >= 50 else 512) if second else 256, 256),
    )
    anchors = _default_anchorgen()
    norm = functools.partial(nn.GroupNorm, 32) if second else None
    head = RetinaNetHead(256, anchors.num_anchors_per_location()[0], num_classes, norm)
    head.regression_head._loss_type = "giou" if second else "l1"
    return RetinaNet(
        backbone,
        num_classes,
        min_size=min(image_size),
        max_size=max(image_size),
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        anchor_generator=anchors,
        head=head,
    )


def peer_key(key: str) -> str:
    """torchvision's name for one of our tensors."""
    part, rest = key.split(".", 1)
    if part == "backbone":
        return f"backbone.body.{rest}"
    if part == "fpn":
        return f"backbone.fpn.{rest}"
    head, last = HEADS[part]
    kind, _, rest = rest.partition(".")
    if kind == "predict":
        return f"head.{head}.{last}.{rest}"
    repeat, tensor = rest.split(".")
    return f"head.{head}.conv.{repeat}.{ {'conv_rep': 0, 'norm_rep': 1}[kind] }.{tensor}"


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Gives every tensor its own random values, such that scores spread and activations keep a sane scale."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: torch.Tensor, low: float, high: float) -> None:
        tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))

    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith("running_var"):
                uniform(tensor, 0.8, 1.25)
            elif tensor.dim() == 1 and key.endswith("weight"):
                uniform(tensor, 0.3, 0.7)
            elif tensor.dim() == 1:
                uniform(tensor, -0.1, 0.1)
            elif tensor.dim() == 4 and key.startswith("head."):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * (2 / tensor[0].numel()) ** 0.5)
        uniform(model.state_dict()["head.classification_head.cls_logits.bias"], -3.0, -1.0)


@functools.lru_cache(maxsize=4)
def model_pair(name: str, image_size: tuple[int, int], num_classes: int = 91) -> Pair:
    """Cached between tests: leave weights and statistics as they are, or work on a deepcopy."""
    torch.manual_seed(0)
    peer = peer_model(name, image_size, num_classes)
    randomise(peer)
    ours = create_model(name, num_classes, image_size=image_size)
    weights = peer.state_dict()
    renamed = {key: weights.pop(peer_key(key)) for key in ours.state_dict()}
    assert not weights, f"torchvision has more: {list(weights)}"
    ours.load_state_dict(renamed)
    assert model_config(name).num_classes == 91
    return Pair(peer.eval(), ours.eval())
