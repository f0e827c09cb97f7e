"""Same weights, same numbers as timm's EfficientNets, with either padding; and what the scaling rules give."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch import nn

from effdet_fast.models import compound_scaling, create_model, model_config, scaled_efficientnet
from effdet_fast.models.anchors import feature_sizes
from effdet_fast.models.backbones import create_backbone, list_backbones
from effdet_fast.models.backbones.efficientnet import VARIANTS, EfficientNet, scale_channels
from effdet_fast.nn import FrozenBatchNormAct2d

timm = pytest.importorskip("timm")

# timm's prefix for each padding.
PREFIXES = {"same": "tf_", "symmetric": ""}
# Odd and even sizes, where the paddings differ: 9x13, 5x7, 3x4.
SIZE = (67, 98)
QUICK = ("efficientnet_b0", "efficientnet_lite0")


def slow_unless(quick: bool) -> list[pytest.MarkDecorator]:
    return [] if quick else [pytest.mark.slow]


NAMES = [pytest.param(name, marks=slow_unless(name in QUICK)) for name in VARIANTS]


def timm_model(name: str, padding: str) -> nn.Module:
    return timm.create_model(PREFIXES[padding] + name, features_only=True, out_indices=(2, 3, 4))


def images() -> torch.Tensor:
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def random_pair(name: str, padding: str) -> tuple[nn.Module, EfficientNet]:
    """Equal weights; running statistics as after this batch, then blurred."""
    peer = timm_model(name, padding)
    norms = [module for module in peer.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.6, 1.4)
        nn.init.uniform_(norm.bias, -0.3, 0.3)
        norm.momentum = 1.0
    with torch.no_grad():
        peer(images())
    for norm in norms:
        norm.momentum = 0.1
        # The coarsest maps are 12 pixels; no channel may look constant.
        norm.running_var.clamp_(min=float(norm.running_var.mean()))
        norm.running_var.mul_(torch.empty_like(norm.running_var).uniform_(0.8, 1.25))
    ours = EfficientNet(name, padding=padding)
    ours.load_state_dict(peer.state_dict())
    return peer.eval(), ours.eval()


@pytest.mark.parametrize(
    ("name", "padding"),
    [(name, "symmetric") for name in VARIANTS]
    + [pytest.param(name, "same", marks=slow_unless(name in QUICK)) for name in VARIANTS],
)
def test_keys_shapes_and_batch_norms_are_timms(name, padding):
    with torch.device("meta"):
        ours = EfficientNet(name, padding=padding)
        peer = timm_model(name, padding)
    expected = [(key, value.shape) for key, value in peer.state_dict().items()]
    assert [(key, value.shape) for key, value in ours.state_dict().items()] == expected
    assert ours.feature_channels == tuple(peer.feature_info.channels())
    norms = {key: module for key, module in peer.named_modules() if isinstance(module, nn.BatchNorm2d)}
    for key, norm in norms.items():
        mine = ours.get_submodule(key)
        assert (mine.eps, mine.momentum) == (norm.eps, norm.momentum), key


@pytest.mark.parametrize("padding", PREFIXES)
@pytest.mark.parametrize("name", NAMES)
def test_feature_maps(name, padding):
    peer, ours = random_pair(name, padding)
    with torch.no_grad():
        actual, expected = ours(images()), peer(images())
    for mine, theirs in zip(actual, expected, strict=True):
        assert theirs.std() > 0.05
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_in_float64(name, one_thread):
    """Of symmetric padding; whole detectors are compared with the other one."""
    peer, ours = (model.double().train() for model in random_pair(name, "symmetric"))
    x = images().double()
    actual, expected = ours(x), peer(x)
    weights = [torch.randn_like(feature) for feature in expected]
    for features in (actual, expected):
        sum((feature * weight).sum() for feature, weight in zip(features, weights, strict=True)).backward()
    # Before a BatchNorm on batch statistics, a bias has no gradient but rounding noise of what flows past it.
    noise = 1e-12 * torch.stack([parameter.grad.norm() for parameter in peer.parameters()]).norm()
    for (key, mine), theirs in zip(ours.named_parameters(), peer.parameters(), strict=True):
        error = (mine.grad - theirs.grad).norm()
        assert error <= 1e-8 * theirs.grad.norm() + noise, f"{key}: gradients differ by {error}"
    torch.testing.assert_close(ours.state_dict(), peer.state_dict())


def test_a_released_network_is_also_one_by_its_multipliers():
    with torch.device("meta"):
        scaled, released = EfficientNet("efficientnet:1.2,1.4"), EfficientNet("efficientnet_b3")
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (scaled, released)]
    assert shapes[0] == shapes[1]


def test_channels_never_fall_more_than_a_tenth():
    assert [scale_channels(32, width) for width in (1.0, 1.1, 1.2, 1.4, 2.0)] == [32, 32, 40, 48, 64]
    assert all(scale_channels(c, w / 10) >= 0.9 * c * w / 10 for c in range(8, 400, 8) for w in range(5, 32))


def test_compound_scaling_matches_the_paper():
    rows = [compound_scaling(phi) for phi in range(8)]
    # 64 * 1.35^phi = 86.4, 116.6, 157.5, 212.6, 287.0, 387.4, 523.0
    assert [row["fpn_channels"] for row in rows] == [64, 88, 120, 160, 216, 288, 384, 520]
    assert [row["fpn_cells"] for row in rows] == [3, 4, 5, 6, 7, 8, 9, 10]
    assert [row["head_repeats"] for row in rows] == [3, 3, 3, 4, 4, 4, 5, 5]
    assert [row["image_size"] for row in rows] == [512, 640, 768, 896, 1024, 1152, 1280, 1408]


def test_compound_scaling_between_whole_coefficients():
    # 64 * 1.35^0.5 = 74.4 and 64 * 1.35^2.9 = 152.8
    assert list(compound_scaling(0.4).values()) == [72, 3, 3, 512]
    assert list(compound_scaling(0.5).values()) == [72, 4, 3, 640]
    assert list(compound_scaling(2.9).values()) == [152, 6, 3, 896]
    rows = [list(compound_scaling(phi / 16).values()) for phi in range(112)]
    assert all(a <= b for row, after in zip(rows, rows[1:], strict=False) for a, b in zip(row, after, strict=True))


def test_scaled_detector():
    with torch.device("meta"):
        model = create_model("efficientdet_d0", **compound_scaling(1.5))
    assert model.config.image_size == (768, 768) and model.config.fpn_channels == 104
    assert len(model.fpn.cell) == 5 and len(model.class_net.conv_rep) == 3


def test_efficientnet_scaling_matches_the_paper():
    assert scaled_efficientnet(0) == {"backbone": "efficientnet:1,1", "image_size": 224}
    # 224 * 1.15^phi = 257.6, 296.2, 340.7
    sizes = [scaled_efficientnet(phi)["image_size"] for phi in (1, 2, 3)]
    assert sizes == [256, 296, 344]
    assert scaled_efficientnet(1)["backbone"] == "efficientnet:1.1,1.2"
    assert scaled_efficientnet(2.5)["backbone"] == "efficientnet:1.26906,1.57744"
    assert scaled_efficientnet(1, alpha=2, beta=1, gamma=1) == {"backbone": "efficientnet:1,2", "image_size": 224}


def test_scaled_network_in_a_detector():
    model = create_model("efficientdet_d0", 2, **{**scaled_efficientnet(0.5), "image_size": 64}, fpn_cells=1)
    assert [tuple(level.shape[2:]) for level in model(torch.zeros(2, 3, 64, 64))[0]] == [
        (side, side) for side in (8, 4, 2, 1, 1)
    ]


@pytest.mark.parametrize("rule", [compound_scaling, scaled_efficientnet])
@pytest.mark.parametrize("phi", [-1, float("nan"), float("inf"), "2", None])
def test_bad_coefficient(rule, phi):
    with pytest.raises(ValueError, match=f"{rule.__name__}: phi must be >= 0 and finite, got {phi!r}"):
        rule(phi)


def test_bad_bases():
    with pytest.raises(ValueError, match=r"alpha \* beta\^2 \* gamma\^2 must be within 5 % of 2, got 2.484"):
        scaled_efficientnet(1, alpha=1.4, beta=1.2, gamma=1.11)
    with pytest.raises(ValueError, match="beta must be >= 1, got 0.9"):
        scaled_efficientnet(1, beta=0.9)


def backbone_of(name: str, **options) -> nn.Module:
    return create_backbone(dataclasses.replace(model_config("efficientdet_d0"), backbone=name, **options))


def test_options_reach_the_backbone():
    symmetric = backbone_of("efficientnet_lite0", padding="symmetric", frozen_batch_norm=True)
    norms = [module for module in symmetric.modules() if "BatchNorm" in type(module).__name__]
    assert len(norms) == 49 - 1 and all(type(norm) is FrozenBatchNormAct2d and norm.eps == 1e-5 for norm in norms)
    assert symmetric.conv_stem.padding == (1, 1)
    assert backbone_of("efficientnet_lite0", backbone_bn_eps=0.25).bn1.eps == 0.25


@pytest.mark.parametrize(
    "name", ["efficientnet_b9", "resnet20", "efficientnet:1.1", "efficientnet:0,1", "efficientnet:a,b", None]
)
def test_unknown_backbone(name):
    with pytest.raises(ValueError, match=rf"must be one of \['efficientnet_b0'.*got {re.escape(repr(name))}"):
        backbone_of(name)
    assert {"efficientnet_b0", "efficientnet_lite4", "resnet50"} <= set(list_backbones())


def test_unknown_padding():
    with pytest.raises(ValueError, match=r"padding must be one of \['same', 'symmetric'\], got ''"):
        EfficientNet("efficientnet_b0", padding="")


@pytest.mark.parametrize(
    ("name", "indices", "channels", "size"),
    [
        ("resnet10t", (2, 3, 4), (128, 256, 512), SIZE),
        ("mobilenetv3_small_100", (2, 3, 4), (24, 48, 576), SIZE),
        ("convnext_atto", (1, 2, 3), (80, 160, 320), (64, 96)),
        ("dla46x_c", (3, 4, 5), (64, 128, 256), (64, 96)),
    ],
)
def test_timm_model_as_backbone(name, indices, channels, size):
    model = create_model("efficientdet_d0", 2, image_size=size, backbone=f"timm:{name}", fpn_cells=1).eval()
    assert model.backbone.feature_channels == channels
    peer = timm.create_model(name, features_only=True, out_indices=indices).eval()
    peer.load_state_dict(model.backbone.state_dict())
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        for mine, theirs in zip(model.backbone(x), peer(x), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
        assert [tuple(level.shape[2:]) for level in model(x)[0]] == feature_sizes(size, 3, 7)


def test_timm_options():
    backbone = backbone_of(
        "timm:resnet10t", image_size=64, frozen_batch_norm=True, backbone_bn_eps=0.25, gradient_checkpointing=True
    )
    norms = [module for module in backbone.modules() if "BatchNorm" in type(module).__name__]
    assert norms and all(type(norm).__name__.startswith("Frozen") and norm.eps == 0.25 for norm in norms)
    sum(feature.square().mean() for feature in backbone.train()(torch.randn(2, 3, 64, 64))).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in backbone.parameters())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet10x", "timm has no model 'resnet10x'; .* close are .*'resnet10t'"),
        ("vit_tiny_patch16_224", r"vit_tiny_patch16_224 (gives no feature maps|must have maps) "),
    ],
)
def test_unusable_timm_model(name, message):
    with pytest.raises(ValueError, match=message):
        backbone_of(f"timm:{name}", image_size=64)


def test_missing_timm(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ValueError, match=r"timm:resnet10t needs `pip install effdet_fast\[timm\]`"):
        backbone_of("timm:resnet10t")
