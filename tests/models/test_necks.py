"""The necks: FPN as torchvision's; FPN, PANet and NAS-FPN as their formulas written out; every combination trains."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effdet_fast.models import model_config
from effdet_fast.models.necks import create_neck, list_necks

CHANNELS = (6, 10, 12)
WIDTH = 8
# 17x25, 9x13, 5x7, then 3x4 and 2x2: odd and even, down to sizes that no factor of two explains.
SIZES = [(17, 25), (9, 13), (5, 7), (3, 4), (2, 2)]
FUSIONS = ["fast", "softmax", "sum"]
EXTRA_LEVELS = ["efficientdet", "c5", "p5", "pool"]


def make_neck(neck: str, fusion: str = "sum", extra_levels: str = "p5", **more) -> nn.Module:
    """Random everywhere, also where training starts from constants."""
    config = dataclasses.replace(
        model_config("efficientdet_d0"),
        neck=neck,
        fusion=fusion,
        extra_levels=extra_levels,
        fpn_channels=WIDTH,
        **{"fpn_cells": 2, **more},
    )
    module = create_neck(CHANNELS, config)
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.dim() == 1:
                low, high = (-0.3, 0.3) if name.endswith(("bias", "running_mean")) else (0.5, 1.5)
                tensor.uniform_(low, high)
    return module


def features(dtype: torch.dtype = torch.float32, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(batch, channels, *size, generator=generator, dtype=torch.float64).to(dtype)
        for channels, size in zip(CHANNELS, SIZES, strict=False)
    ]


def nearest(x: Tensor, size: torch.Size) -> Tensor:
    rows, columns = (torch.arange(n) * old // n for n, old in zip(size, x.shape[2:], strict=True))
    return x[:, :, rows][:, :, :, columns]


def fused(weights: Tensor | None, method: str, *inputs: Tensor) -> Tensor:
    if method == "sum" or weights is None:
        return sum(inputs)
    if method == "softmax":
        weights = weights.exp() / weights.exp().sum()
    else:
        weights = weights.relu() / (weights.relu().sum() + 1e-4)
    return sum(weight * x for weight, x in zip(weights, inputs, strict=True))


def conv(x: Tensor, module: nn.Module, stride: int = 1) -> Tensor:
    weight = module.weight
    return F.conv2d(x, weight, module.bias, stride=stride, padding=weight.shape[-1] // 2)


def batch_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """In evaluation mode."""
    scale = norm.weight / (norm.running_var + 1e-3).sqrt()
    return x * scale[:, None, None] + (norm.bias - norm.running_mean * scale)[:, None, None]


def expected_extra_levels(neck: nn.Module, how: str, c5: Tensor, p5: Tensor) -> list[Tensor]:
    layers = neck.extra_blocks
    if how == "pool":
        return [p5[:, :, ::2, ::2], p5[:, :, ::4, ::4]]
    if how == "efficientdet":
        p6 = layers["p6"].conv
        x = batch_norm(conv(c5, p6.conv), p6.bn)
        pooled = []
        for _ in range(2):
            # SAME padding: the windows of an odd side start one before it, those of an even side at it.
            (top, bottom), (left, right) = ((side % 2, 1) for side in x.shape[2:])
            x = F.max_pool2d(F.pad(x, (left, right, top, bottom), value=-torch.inf), 3, 2)
            pooled.append(x)
        return pooled
    p6 = conv(c5 if how == "c5" else p5, layers["p6"], stride=2)
    return [p6, conv(p6.relu(), layers["p7"], stride=2)]


def expected_fpn(neck: nn.Module, fusion: str, maps: list[Tensor]) -> list[Tensor]:
    l3, l4, l5 = (conv(x, block[0]) for x, block in zip(maps, neck.inner_blocks, strict=True))
    fuse3, fuse4 = neck.top_down_fusions
    m4 = fused(fuse4.edge_weights, fusion, l4, nearest(l5, l4.shape[2:]))
    m3 = fused(fuse3.edge_weights, fusion, l3, nearest(m4, l3.shape[2:]))
    return [conv(x, block[0]) for x, block in zip((m3, m4, l5), neck.layer_blocks, strict=True)]


def expected_panet(neck: nn.Module, fusion: str, maps: list[Tensor]) -> list[Tensor]:
    p3, p4, p5 = expected_fpn(neck, fusion, maps)

    def step(index: int, p: Tensor, finer: Tensor) -> Tensor:
        down = conv(finer, neck.down_blocks[index], stride=2).relu()
        merged = fused(neck.bottom_up_fusions[index].edge_weights, fusion, p, down)
        return conv(merged, neck.bottom_up_blocks[index]).relu()

    n4 = step(0, p4, p3)
    return [p3, n4, step(1, p5, n4)]


def expected_nas_fpn_cell(cell: nn.Module, fusion: str, levels: list[Tensor]) -> list[Tensor]:
    p3, p4, p5, p6, p7 = levels

    def finish(name: str, x: Tensor) -> Tensor:
        node = cell.merges[name]
        return batch_norm(conv(x.relu(), node.conv), node.bn)

    def merge(name: str, first: Tensor, second: Tensor) -> Tensor:
        return fused(cell.merges[name].combine.edge_weights, fusion, first, second)

    def pool(x: Tensor, side: int, like: Tensor) -> Tensor:
        rows, columns = (n * side - old for n, old in zip(like.shape[2:], x.shape[2:], strict=True))
        return F.max_pool2d(F.pad(x, (0, columns, 0, rows), value=-torch.inf), side)

    def gate(x: Tensor) -> Tensor:
        return torch.sigmoid(x.mean((2, 3), keepdim=True))

    p4_1 = finish("gp_64_4", merge("gp_64_4", gate(p4) * nearest(p6, p4.shape[2:]), p4))
    p4_2 = finish("sum_44_4", merge("sum_44_4", p4_1, p4))
    p3 = finish("sum_43_3", merge("sum_43_3", nearest(p4_2, p3.shape[2:]), p3))
    p4 = finish("sum_34_4", merge("sum_34_4", pool(p3, 2, p4), p4_2))
    small3, small4 = pool(p3, 4, p5), pool(p4, 2, p5)
    p5 = finish("sum_55_5", merge("sum_55_5", p5, merge("gp_43_5", gate(small3) * small4, small3)))
    small4, small5 = pool(p4_2, 8, p7), pool(p5, 4, p7)
    p7 = finish("sum_77_7", merge("sum_77_7", p7, merge("gp_54_7", gate(small4) * small5, small4)))
    small5 = pool(p5, 2, p6)
    p6 = finish("gp_75_6", merge("gp_75_6", gate(small5) * nearest(p7, p6.shape[2:]), small5))
    return [p3, p4, p5, p6, p7]


@pytest.mark.parametrize("extra_levels", EXTRA_LEVELS)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("neck", ["fpn", "panet", "nas_fpn"])
def test_formula(neck, fusion, extra_levels):
    module = make_neck(neck, fusion, extra_levels).double().eval()
    maps = features(torch.float64)
    with torch.no_grad():
        actual = module(maps)
        if neck == "nas_fpn":
            levels = [
                batch_norm(conv(x, project.conv), project.bn) for x, project in zip(maps, module.lateral, strict=True)
            ]
            expected = levels + expected_extra_levels(module, extra_levels, maps[-1], levels[-1])
            for cell in module.cell:
                expected = expected_nas_fpn_cell(cell, fusion, expected)
        else:
            levels = (expected_fpn if neck == "fpn" else expected_panet)(module, fusion, maps)
            expected = levels + expected_extra_levels(module, extra_levels, maps[-1], levels[-1])
    assert [tuple(level.shape[2:]) for level in actual] == SIZES
    for level, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(level, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("extra_levels", ["c5", "p5"])
def test_fpn_is_torchvisions(extra_levels):
    detection = pytest.importorskip("torchvision").ops.feature_pyramid_network
    extra = detection.LastLevelP6P7(CHANNELS[-1] if extra_levels == "c5" else WIDTH, WIDTH)
    peer = detection.FeaturePyramidNetwork(list(CHANNELS), WIDTH, extra)
    ours = make_neck("fpn", "sum", extra_levels)
    assert list(ours.state_dict()) == list(peer.state_dict())
    ours.load_state_dict(peer.state_dict())
    results = []
    for module, run in ((ours, ours), (peer, lambda maps: list(peer(OrderedDict(enumerate(maps))).values()))):
        maps = [feature.requires_grad_() for feature in features()]
        levels = run(maps)
        sum(level.square().sum() for level in levels).backward()
        results.append([*levels, *(x.grad for x in (*maps, *module.parameters()))])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("extra_levels", EXTRA_LEVELS)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("neck", list_necks())
def test_every_parameter_learns(neck, fusion, extra_levels):
    module = make_neck(neck, fusion, extra_levels, padding="symmetric" if fusion == "softmax" else "same").train()
    maps = [feature.to(memory_format=torch.channels_last).requires_grad_() for feature in features()]
    levels = module(maps)
    assert [tuple(level.shape[1:]) for level in levels] == [(WIDTH, *size) for size in SIZES]
    assert all(level.is_contiguous(memory_format=torch.channels_last) for level in levels)
    target = [torch.randn_like(level) for level in levels]
    sum((level - wanted).square().sum() for level, wanted in zip(levels, target, strict=True)).backward()
    for name, tensor in (*module.named_parameters(), *((f"map {i}", x) for i, x in enumerate(maps))):
        assert tensor.grad is not None and torch.isfinite(tensor.grad).all(), name
        assert tensor.grad.abs().max() > 0, name
    assert any(name.endswith("edge_weights") for name, _ in module.named_parameters()) == (fusion != "sum")


@pytest.mark.parametrize("neck", ["fpn", "panet", "bifpn"])
@pytest.mark.parametrize("max_level", [5, 6, 8])
def test_other_numbers_of_levels(neck, max_level):
    levels = make_neck(neck, max_level=max_level, extra_levels="c5")(features())
    assert [tuple(level.shape[2:]) for level in levels] == [*SIZES, (1, 1)][: max_level - 2]


def test_bifpn_with_symmetric_padding_is_effdets():
    """Even sizes too, where the two paddings read different windows."""
    peer = pytest.importorskip("effdet").efficientdet
    config = pytest.importorskip("effdet").get_efficientdet_config("efficientdet_d0")
    config.fpn_channels, config.image_size = WIDTH, (96, 160)
    sizes = [(12, 20), (6, 10), (3, 5)]
    info = [dict(num_chs=c, size=size, reduction=8) for c, size in zip(CHANNELS, sizes, strict=True)]
    theirs = peer.BiFpn(config, info).eval()
    ours = make_neck("bifpn", "fast", "efficientdet", padding="symmetric", redundant_bias=False, fpn_cells=3).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    maps = [torch.randn(2, c, *size) for c, size in zip(CHANNELS, sizes, strict=True)]
    with torch.no_grad():
        for mine, expected in zip(ours(maps), theirs(list(maps)), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("neck", ["nas_fpn", "bifpn"])
def test_recomputing_cells_changes_no_gradient(neck):
    plain = make_neck(neck, "fast")
    recomputed = make_neck(neck, "fast", gradient_checkpointing=True)
    recomputed.load_state_dict(plain.state_dict())
    for module in (plain, recomputed):
        sum(level.square().sum() for level in module.train()(features())).backward()
    for (name, parameter), other in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), name


@pytest.mark.parametrize("neck", ["panet", "nas_fpn"])
def test_compiled_neck_is_the_eager_one(neck):
    module = make_neck(neck, "fast", fpn_cells=1)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    results = []
    for run in (module, compiled):
        module.zero_grad()
        levels = run(features())
        sum(level.square().sum() for level in levels).backward()
        results.append([*levels, *(parameter.grad for parameter in module.parameters())])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_bad_choices():
    with pytest.raises(ValueError, match=r"neck must be one of \['fpn', 'panet', 'nas_fpn', 'bifpn'\], got 'pafpn'"):
        make_neck("pafpn")
    with pytest.raises(ValueError, match="NasFpn: the published cell has levels 3 to 7, got 3 to 8"):
        make_neck("nas_fpn", max_level=8)
    with pytest.raises(ValueError, match=r"extra_levels must be one of \['efficientdet', 'c5', 'p5', 'pool'\]"):
        make_neck("fpn", extra_levels="c6")
