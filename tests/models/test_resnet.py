"""Same weights, same numbers as torchvision's ResNet: feature maps, gradients, statistics left behind."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from effdet_fast.models import model_config
from effdet_fast.models.backbones import create_backbone
from effdet_fast.models.backbones.resnet import VARIANTS, ResNet
from effdet_fast.nn import BatchNormAct2d, FrozenBatchNormAct2d, freeze_batch_norm

torchvision = pytest.importorskip("torchvision")

# Odd sizes on most levels: 9x13, 5x7, 3x4.
SIZE = (67, 98)


def cases(option: str, values: dict[str, Any], quick: set[tuple[str, str]]) -> pytest.MarkDecorator:
    """Every network with every value of an option, by their ids; those not in `quick` are slow."""
    rows = [
        pytest.param(name, value, id=f"{name}-{key}", marks=[] if (name, key) in quick else [pytest.mark.slow])
        for name in VARIANTS
        for key, value in values.items()
    ]
    return pytest.mark.parametrize(("name", option), rows)


class Pair(NamedTuple):
    peer: nn.Module
    ours: ResNet


def peer_features(peer: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    x = peer.layer1(peer.maxpool(peer.relu(peer.bn1(peer.conv1(images)))))
    c3 = peer.layer2(x)
    c4 = peer.layer3(c3)
    return [c3, c4, peer.layer4(c4)]


def our_model(name: str, frozen: bool) -> ResNet:
    backbone = ResNet(name)
    return freeze_batch_norm(backbone) if frozen else backbone


def state_without_classifier(peer: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value for key, value in peer.state_dict().items() if not key.startswith("fc.")}


def images(size: tuple[int, int] = SIZE, seed: int = 1) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))


def random_pair(name: str, frozen: bool) -> Pair:
    """Equal weights, drawn around statistics of real activations so that no map explodes."""
    source = torchvision.models.get_model(name)
    for norm in source.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.6, 1.4)
            nn.init.uniform_(norm.bias, -0.3, 0.3)
            norm.momentum = 1.0
    for block in source.modules():
        if isinstance(block, torchvision.models.resnet.BasicBlock | torchvision.models.resnet.Bottleneck):
            # Otherwise the sum over all residual branches grows, and with it the rounding errors.
            nn.init.uniform_((block.bn3 if hasattr(block, "bn3") else block.bn2).weight, 0.05, 0.25)
    with torch.no_grad():
        peer_features(source, images(seed=2))
    for norm in source.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 0.1
            norm.running_var.mul_(torch.empty_like(norm.running_var).uniform_(0.8, 1.25))
    peer = source
    if frozen:
        peer = torchvision.models.get_model(name, norm_layer=torchvision.ops.FrozenBatchNorm2d)
        peer.load_state_dict(source.state_dict())
    ours = our_model(name, frozen)
    ours.load_state_dict(state_without_classifier(source))
    return Pair(peer.eval(), ours.eval())


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_keys_shapes_and_parameters_are_torchvisions(name, frozen):
    norm = torchvision.ops.FrozenBatchNorm2d if frozen else None
    with torch.device("meta"):
        peer = torchvision.models.get_model(name, norm_layer=norm)
        ours = our_model(name, frozen)
    expected = [(key, value.shape) for key, value in state_without_classifier(peer).items()]
    assert [(key, value.shape) for key, value in ours.state_dict().items()] == expected
    parameters = [key for key, _ in peer.named_parameters() if not key.startswith("fc.")]
    assert [key for key, _ in ours.named_parameters()] == parameters
    assert ours.feature_channels[-1] == peer.fc.in_features


@cases(
    "layout",
    {"nchw": torch.contiguous_format, "nhwc": torch.channels_last},
    quick={("resnet18", "nchw"), ("resnet18", "nhwc"), ("resnet50", "nhwc")},
)
def test_feature_maps(name, layout):
    pair = random_pair(name, frozen=False)
    with torch.no_grad():
        actual = pair.ours.to(memory_format=layout)(images().to(memory_format=layout))
        expected = peer_features(pair.peer, images())
    assert tuple(feature.shape[1] for feature in actual) == pair.ours.feature_channels
    for ours, peer in zip(actual, expected, strict=True):
        assert peer.std() > 0.05
        torch.testing.assert_close(ours, peer, atol=1e-4, rtol=0)
        assert ours.is_contiguous(memory_format=layout)


@cases(
    "frozen",
    {"trained": False, "frozen": True},
    quick={("resnet18", "trained"), ("resnet18", "frozen"), ("resnet50", "trained")},
)
def test_training_mode_in_float64(name, frozen, one_thread):
    """Gradients of a loss on every map and the running statistics afterwards; frozen ones stay in training mode too."""
    pair = random_pair(name, frozen)
    before = copy.deepcopy(pair.ours.state_dict())
    peer, ours = pair.peer.double().train(), pair.ours.double().train()
    x = images((35, 50)).double()
    expected, actual = peer_features(peer, x), ours(x)
    weights = [torch.randn_like(feature) for feature in expected]
    for features in (expected, actual):
        sum((feature * weight).sum() for feature, weight in zip(features, weights, strict=True)).backward()
    for feature, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(feature, other, atol=1e-9, rtol=1e-9)
    gradients = {key: value.grad for key, value in peer.named_parameters() if not key.startswith("fc.")}
    assert [key for key, _ in ours.named_parameters()] == list(gradients)
    for key, parameter in ours.named_parameters():
        error = (parameter.grad - gradients[key]).norm() / gradients[key].norm()
        assert error < 1e-8, f"{key}: gradients differ by {error}"
    after = state_without_classifier(peer)
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, after[key], msg=lambda text, key=key: f"{key}: {text}")
    statistics = [key for key in before if "running" in key]
    assert all(torch.equal(before[key].double(), after[key]) == frozen for key in statistics)


def test_configuration_reaches_the_backbone():
    base = model_config("efficientdet_d0")
    plain = create_backbone(dataclasses.replace(base, backbone="resnet18"))
    frozen = create_backbone(
        dataclasses.replace(base, backbone="resnet18", frozen_batch_norm=True, backbone_bn_eps=0.0)
    )
    for backbone, kind, eps in ((plain, BatchNormAct2d, 1e-5), (frozen, FrozenBatchNormAct2d, 0.0)):
        norms = [module for module in backbone.modules() if "BatchNorm" in type(module).__name__]
        assert len(norms) == 20
        assert all(type(norm) is kind and norm.eps == eps for norm in norms)


def test_recomputing_blocks_changes_no_gradient():
    plain = random_pair("resnet18", frozen=False).ours.train()
    recomputed = ResNet("resnet18", recompute=True)
    recomputed.load_state_dict(plain.state_dict())
    for model in (plain, recomputed.train()):
        sum(feature.square().mean() for feature in model(images())).backward()
    for (key, parameter), other in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), key
    torch.testing.assert_close(plain.state_dict(), recomputed.state_dict(), rtol=0, atol=0)


def test_initial_weights_have_torchvisions_scale():
    ours, peer = ResNet("resnet18"), torchvision.models.resnet18()
    for key, value in ours.state_dict().items():
        expected = peer.state_dict()[key]
        if value.dim() == 4:
            assert value.std().item() == pytest.approx(expected.std().item(), rel=0.1), key
        else:
            torch.testing.assert_close(value, expected)


def test_unknown_name():
    with pytest.raises(ValueError, match=r"ResNet: name must be one of \['resnet18'.*'resnet152'\], got 'resnet20'"):
        ResNet("resnet20")
