"""Accelerated effdet models give effdet's numbers: outputs, gradients and running statistics of every family."""

from __future__ import annotations

import copy

import pytest
import torch

import effdet_fast
from tests.acceleration.effdet_benches import CLASSES, effdet, images, model_of, tiny

# Levels of 9x13, 5x7, 3x4, 2x2 and 1x1 pixels.
ODD = (72, 104)
FAMILIES = {
    "tf": ("tf_efficientdet_d0", {}),
    "lite": ("tf_efficientdet_lite0", {}),
    "symmetric padding": ("efficientdet_d0", {}),
    "softmax": ("tf_efficientdet_d0", {"fpn_name": "bifpn_attn"}),
    "sum": ("tf_efficientdet_d0", {"fpn_name": "bifpn_sum"}),
    "PAN": ("cspresdext50pan", {}),
    "quad": ("efficientdet_q0", {}),
    "bilinear": ("efficientdetv2_dt", {}),
    "average": ("tf_efficientdet_d0", {"downsample_type": "avg"}),
    "no separable": ("resdet50", {}),
    "activation after": ("tf_efficientdet_d0", {"conv_bn_relu_pattern": True}),
}


def outcome(model, x):
    """By name, outputs and running statistics, and gradients; drop path under one seed."""
    values, outputs = values_of(model, x)
    weights = [torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y) for y in outputs]
    sum((y * w).sum() for y, w in zip(outputs, weights, strict=True)).backward()
    # Features taken before the end of a backbone leave parameters without a gradient.
    return values, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def values_of(model, x):
    torch.manual_seed(3)
    outputs = [level for levels in model(x) for level in levels]
    values = {f"output {i}": y for i, y in enumerate(outputs)} | dict(model.named_buffers())
    return {name: value.detach().double() for name, value in values.items()}, outputs


def check(plain, size, *, training, batch):
    """Equal in float64, gradients too. In float32, outputs and statistics are as near to those as effdet's own.

    That is, within 1e-4, or where that is too much to ask, as BatchNorms have little to average on the coarsest levels, within a
    few times effdet's own error. Float32 gradients say little: rounding decides on which side of ReLU6's kinks values fall.
    """
    model = copy.deepcopy(plain)
    report = effdet_fast.accelerate(model)
    x = images(batch, size)
    found, expected = (outcome(copy.deepcopy(m).double().train(training), x.double()) for m in (model, plain))
    assert expected[0]["output 0"].std() > 0.05 and expected[0]["output 5"].std() > 0.05
    for name, exact in expected[0].items():
        torch.testing.assert_close(
            found[0][name], exact, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )
    # Before a BatchNorm on batch statistics, a bias has no gradient but rounding noise of what flows past it.
    noise = 1e-12 * torch.stack([gradient.norm() for gradient in expected[1].values()]).norm()
    assert found[1].keys() == expected[1].keys()
    for name, exact in expected[1].items():
        error = (found[1][name] - exact).norm()
        assert error <= 1e-9 * exact.norm() + noise, f"{name}: gradients differ by {error}"

    with torch.no_grad():
        found, peer = (values_of(m.train(training), x)[0] for m in (model, plain))
    for name, exact in expected[0].items():
        error, of_peer = ((each[name] - exact).norm() for each in (found, peer))
        bound = max(1e-4 * exact.norm(), 4 * of_peer)
        assert error <= bound, f"{name}: float32 is off by {error}, allowed {bound}"
    return report


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, training):
    name, options = FAMILIES[family]
    report = check(tiny(name, ODD, **options), ODD, training=training, batch=4 if training else 2)
    assert [row for row in report.swapped if row.family == "fusion"]


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", effdet.config.model_config.efficientdet_model_param_dict)
def test_every_model(name, training):
    """In training, eight samples of the coarsest level, one pixel, or its BatchNorms would make much of float32's rounding."""
    size, batch = ((64, 64), 8) if training else ((128, 128), 2)
    report = check(model_of(name, size, num_classes=CLASSES), size, training=training, batch=batch)
    assert {"fusion", "batch_norm_act"} & {row.family for row in report.swapped}


def fusion_rows(report):
    return {(row.kind, row.replacement or row.reason) for row in report.rows if row.family == "fusion"}


NODE = ("Fnode", "weighted_fusion(activation=)")
INSIDE, BEFORE = ("FpnCombine", "weighted_fusion(resample=)"), ("FpnCombine", "weighted_fusion, resampled before")


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("tf", {NODE, INSIDE}),
        ("symmetric padding", {NODE, INSIDE, BEFORE}),
        ("bilinear", {NODE, BEFORE}),
        ("average", {NODE, BEFORE, INSIDE}),
        ("PAN", {INSIDE, BEFORE, ("FpnCombine", "1 input")}),
        ("activation after", {INSIDE}),
    ],
)
def test_the_report_tells_what_the_op_resamples(family, expected):
    name, options = FAMILIES[family]
    assert fusion_rows(effdet_fast.accelerate(tiny(name, ODD, **options))) == expected


def test_unknown_fusions_are_left_alone():
    model = tiny()
    first, second, third = (node.combine for node in list(model.fpn.cell[0].fnode)[:3])
    first.weight_method = "median"
    second.inputs_offsets = (*second.inputs_offsets, second.inputs_offsets[0])
    third.inputs_offsets = (0, 1, 2, 3, 4)
    reasons = {row.path: row.reason for row in effdet_fast.accelerate(model).left_alone}
    assert reasons == {
        "fpn.cell.0.fnode.0.combine": "weight_method 'median'",
        "fpn.cell.0.fnode.1.combine": "the same input twice",
        "fpn.cell.0.fnode.2.combine": "5 inputs",
    }


def test_an_unknown_version_is_left_alone():
    model = tiny()
    del model.fpn.cell[0].fnode[0].combine.resample["3"].input_size
    del model.class_net.bn_level_first
    reasons = {row.path: row.reason for row in effdet_fast.accelerate(model).left_alone}
    assert set(reasons) == {"fpn.cell.0.fnode.0.combine", "class_net"}
    assert set(reasons.values()) == {"an unknown version of it"}


def test_an_activation_is_reported_where_it_is_computed():
    """In a node with the fusion, or where that cannot take it, with the convolution."""
    model = tiny()
    model.fpn.cell[0].fnode[0].combine.weight_method = "median"
    rows = [row for row in effdet_fast.accelerate(model).swapped if row.kind == "Fnode"]
    assert {row.replacement for row in rows if row.path.endswith("fnode.0")} == {"depthwise_conv2d(prologue=)"}
    assert {row.replacement for row in rows if not row.path.endswith("fnode.0")} == {"weighted_fusion(activation=)"}


PARTS = [
    "combine",
    "combine.resample.1.conv",
    "combine.resample.6",
    "combine.resample.6.upsample",
    "after_combine",
    "after_combine.act",
    "after_combine.conv",
    "after_combine.conv.conv_dw",
]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("before", [True, False])
def test_hooks_on_parts_of_a_node_are_called(part, before):
    model = tiny().eval()
    plain, calls = copy.deepcopy(model), []
    module = model.fpn.cell[0].fnode[2].get_submodule(part)
    if not before:
        effdet_fast.accelerate(model)
    module.register_forward_hook(lambda module, inputs, output: calls.append(output.shape))
    effdet_fast.accelerate(model)
    x = images(2, (64, 64))
    with torch.no_grad():
        ours, theirs = model(x), plain(x)
    assert len(calls) == 1
    for y, expected in zip(ours[0], theirs[0], strict=True):
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", ["act", "bn_rep.0.2", "bn_rep.0.2.bn", "conv_rep.0"])
def test_hooks_on_parts_of_a_head_are_called(part):
    model, calls = tiny(), []
    effdet_fast.accelerate(model)
    model.class_net.get_submodule(part).register_forward_hook(lambda *_: calls.append(1))
    model(images(2, (64, 64)))
    assert len(calls) == (1 if "bn_rep" in part else 5)


@pytest.mark.parametrize("fpn_name", ["bifpn_fa", "bifpn_attn", "bifpn_sum"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("features", [[torch.bfloat16] * 5, [torch.float32, *[torch.bfloat16] * 4]])
def test_autocast(fpn_name, layout, features):
    """Nodes have effdet's dtype, and the layout of what they fuse."""
    node = tiny(fpn_name=fpn_name, backbone_name="test_efficientnet").fpn.cell[0].fnode[0]
    maps = [
        torch.randn(2, channels, side, side).to(dtype=dtype, memory_format=layout)
        for channels, side, dtype in zip((32, 48, 64, 64, 64), (8, 4, 2, 1, 1), features, strict=True)
    ]
    plain = copy.deepcopy(node)
    effdet_fast.accelerate(node)
    with torch.autocast("cpu", torch.bfloat16):
        assert node.combine(maps).dtype == plain.combine(maps).dtype
        assert node.combine([x.clone() for x in maps]).is_contiguous(memory_format=layout)
        y, expected = node(maps), plain(maps)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)


@pytest.mark.cuda
@pytest.mark.parametrize("fpn_name", ["bifpn_fa", "bifpn_attn", "bifpn_sum"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_on_a_gpu(fpn_name, dtype):
    plain = tiny(fpn_name=fpn_name).cuda().eval()
    model, x, dtypes = copy.deepcopy(plain), images(2, (64, 64)).cuda(), []
    effdet_fast.accelerate(model)
    for each in (model, plain):
        for node in each.fpn.cell[0].fnode:
            node.combine.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    with torch.autocast("cuda", dtype), torch.no_grad():
        ours, theirs = model(x), plain(x)
    assert dtypes[: len(dtypes) // 2] == dtypes[len(dtypes) // 2 :]
    for y, expected in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True):
        assert y.dtype == expected.dtype
        torch.testing.assert_close(y, expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("side", [2, 1])
def test_a_node_compiles_without_a_graph_break(side):
    """Also of one tensor twice, as in small images, where the coarsest level is the one before it."""
    node = tiny().fpn.cell[0].fnode[0]
    effdet_fast.accelerate(node)
    maps = [torch.randn(2, 64, 1, 1, requires_grad=True) for _ in range(5)]
    maps[4] = maps[3] if side == 1 else maps[4]
    y = torch.compile(node, backend="aot_eager", fullgraph=True)(maps)
    expected = node(maps)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(each.sum(), [maps[3], *node.parameters()]) for each in (y, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tf_efficientdet_d0", "efficientdet_lite0"])
def test_a_model_compiles_without_a_graph_break(name):
    plain = model_of(name, (128, 128), num_classes=CLASSES, backbone_args={"drop_path_rate": 0.0}).double()
    model, x = copy.deepcopy(plain), images(2, (128, 128)).double()
    effdet_fast.accelerate(model)
    assert torch._dynamo.explain(model)(x).graph_break_count == 0
    torch._dynamo.reset()
    found, expected = outcome(torch.compile(model, backend="aot_eager", fullgraph=True), x), outcome(plain, x)
    for i in range(10):
        torch.testing.assert_close(found[0][f"output {i}"], expected[0][f"output {i}"], rtol=1e-9, atol=1e-9)


def test_state_and_classes_after_restoring():
    model = tiny()
    classes, state = [type(m) for m in model.modules()], list(model.state_dict())
    attributes, parameters = [set(m.__dict__) for m in model.modules()], list(model.parameters())
    effdet_fast.accelerate(model)
    assert list(model.state_dict()) == state
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert not effdet_fast.accelerate(model).swapped
    effdet_fast.restore(model)
    assert [type(m) for m in model.modules()] == classes
    assert [set(m.__dict__) for m in model.modules()] == attributes
