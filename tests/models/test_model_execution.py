"""How the model runs: memory layout, precision, compilation, copies, determinism, learning."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from effdet_fast.models import create_model
from effdet_fast.models.necks.bifpn import bifpn_nodes
from effdet_fast.models.necks.extra_levels import max_pool
from effdet_fast.nn import BatchNormAct2d, BlockSequence, SeparableConv2d
from effdet_fast.ops.anchor_matching import pairwise_iou
from effdet_fast.ops.detection_loss import per_anchor_view
from tests.checks import all_equal
from tests.generated_data import random_objects

NAMES = ["efficientdet_d0", "efficientdet_lite0"]


def small(name: str, **overrides):
    torch.manual_seed(0)
    settings = {"image_size": (96, 160), "fpn_cells": 2, "head_repeats": 2, **overrides}
    return create_model(name, 5, **settings)


def is_channels_last(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", NAMES)
def test_channels_last_stays_channels_last(name):
    """Every module's output, and every gradient that arrives there."""
    model = small(name, image_size=(256, 320)).to(memory_format=torch.channels_last).train()
    seen: list[str] = []
    wrong: list[str] = []

    def check(key, tensor):
        if tensor.dim() == 4 and tensor.shape[1] > 1 and tensor.shape[2] * tensor.shape[3] > 1:
            seen.append(key)
            if not is_channels_last(tensor):
                wrong.append(f"{key} {list(tensor.shape)} {tensor.stride()}")

    def hook(key):
        def observe(module, inputs, output):
            for tensor in output if isinstance(output, list) else [output]:
                check(key, tensor)
                tensor.register_hook(lambda gradient: check(f"gradient of {key}", gradient))

        return observe

    for key, module in model.named_modules():
        if key:
            module.register_forward_hook(hook(key))
    x = torch.randn(2, 3, 256, 320).to(memory_format=torch.channels_last)
    gt_boxes, gt_labels = random_objects(2, 5, (256, 320), 5)
    model.loss(model(x), gt_boxes, gt_labels).total.backward()
    assert not wrong
    assert {"fpn.cell.1.fnode.7.combine", "class_net.predict", "gradient of backbone.blocks.0.0.conv_dw"} <= set(seen)


@pytest.mark.parametrize("name", NAMES)
def test_layouts_give_the_same_numbers(name):
    model = small(name).eval()
    x = torch.randn(2, 3, 96, 160)
    with torch.no_grad():
        expected = model(x)
        actual = copy.deepcopy(model).to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    for ours, reference in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


def test_loss_reads_the_outputs_in_place():
    output = torch.randn(2, 18, 4, 6).to(memory_format=torch.channels_last)
    view = per_anchor_view(output, 9)
    assert view.data_ptr() == output.data_ptr() and view.is_contiguous() and view.shape == (2, 4, 6, 9, 2)
    assert torch.equal(view[1, 3, 2, 5], output[1, 10:12, 3, 2])
    contiguous = per_anchor_view(output.contiguous(), 9)
    assert torch.equal(contiguous, view)


@pytest.mark.parametrize("name", NAMES)
def test_bf16_autocast(name):
    model = small(name, drop_path_rate=0.0)
    x = torch.randn(2, 3, 96, 160)
    gt_boxes, gt_labels = random_objects(2, 5, (96, 160), 5)
    model.train()(x)
    # With statistics kept still: those of the coarsest levels, over four values a channel, turn rounding into noise.
    expected = model.eval().loss(model(x), gt_boxes, gt_labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(x)
        loss = model.loss(outputs, gt_boxes, gt_labels)
        detections = model.detect(outputs)
    assert outputs[0][0].dtype == outputs[1][0].dtype == torch.bfloat16
    assert loss.total.dtype == loss.cls.dtype == loss.box.dtype == detections.boxes.dtype == torch.float32
    torch.testing.assert_close(loss.total, expected.total, rtol=0.05, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.train().loss(model(x), gt_boxes, gt_labels).total.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32 and torch.isfinite(parameter.grad).all(), key


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("efficientdet_lite0", "aot_eager"),
        ("efficientdet_d0", "aot_eager"),
        ("efficientdet_lite0", "inductor"),
        ("efficientdet_d0", "inductor"),
    ],
)
@pytest.mark.slow
def test_compiled_forward_and_gradients(name, backend):
    """Traced whole, forward and backward; what the compiler makes of it takes minutes to build."""
    model = small(name, fpn_cells=1, head_repeats=1, drop_path_rate=0.0).eval()
    x = torch.randn(2, 3, 96, 160).to(memory_format=torch.channels_last)
    model = model.to(memory_format=torch.channels_last)
    gt_boxes, gt_labels = random_objects(2, 5, (96, 160), 5)
    expected = model(x)
    model.loss(expected, gt_boxes, gt_labels).total.backward()
    reference = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    actual = torch.compile(model, fullgraph=True, backend=backend)(x)
    for ours, eager in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)
    model.loss(actual, gt_boxes, gt_labels).total.backward()
    for key, parameter in model.named_parameters():
        error = (parameter.grad - reference[key]).norm()
        assert error <= 1e-3 * reference[key].norm() + 1e-6, key


@pytest.mark.parametrize("name", ["efficientdet_d0", "retinanet_resnet18_fpn_v2"])
def test_labels_loss_and_detections_do_not_read_values_back(name):
    """Data-dependent Python control flow fails on fake tensors, so this is what a host sync would trip over."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = small(name, fpn_cells=1, head_repeats=1)
    with torch.no_grad():
        shapes = [[level.shape for level in levels] for levels in model(torch.zeros(2, 3, 96, 160))]
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        outputs = tuple([torch.zeros(shape) for shape in levels] for levels in shapes)
        loss = model.loss(outputs, torch.zeros(2, 4, 4), torch.zeros(2, 4, dtype=torch.int64))
        detections = model.detect(outputs, score_threshold=0.1, max_detections=4, clip_sizes=torch.zeros(2, 2))
    assert loss.total.shape == () and loss.total.device.type == "cuda"
    assert detections.boxes.shape == (2, 4, 4) and detections.counts.shape == (2,)


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("other", [1, 6, 7])
def test_max_pool_with_same_padding(side, other):
    x = torch.randn(2, 3, side, other) - 3.0
    sizes = ((side + 1) // 2, (other + 1) // 2)
    pads = []
    for length, size in ((other, sizes[1]), (side, sizes[0])):
        total = max((size - 1) * 2 + 3 - length, 0)
        pads += [total // 2, total - total // 2]
    expected = torch.nn.functional.max_pool2d(torch.nn.functional.pad(x, pads, value=-torch.inf), 3, 2)
    assert torch.equal(max_pool(x, "same"), expected)


def test_bifpn_nodes_are_the_papers():
    nodes = [[(entry.offset, entry.resample) for entry in node] for node in bifpn_nodes(5)]
    assert nodes == [
        [(3, "none"), (4, "nearest")],
        [(2, "none"), (5, "nearest")],
        [(1, "none"), (6, "nearest")],
        [(0, "none"), (7, "nearest")],
        [(1, "none"), (7, "none"), (8, "max_pool")],
        [(2, "none"), (6, "none"), (9, "max_pool")],
        [(3, "none"), (5, "none"), (10, "max_pool")],
        [(4, "none"), (11, "max_pool")],
    ]


def test_repeats_are_bitwise_equal():
    model = small("efficientdet_d0", drop_path_rate=0.0).train()
    x = torch.randn(2, 3, 96, 160)
    gt_boxes, gt_labels = random_objects(2, 30, (96, 160), 5)
    results = []
    for _ in range(3):
        model.zero_grad()
        loss = model.loss(model(x), gt_boxes, gt_labels)
        loss.total.backward()
        results.append([loss.total.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    for repeat in results[1:]:
        assert all_equal(repeat, results[0])


def test_drop_path_drops_whole_samples():
    model = small("efficientdet_d0", drop_path_rate=0.9).train()
    block = model.backbone.blocks[5][1]
    assert block.has_skip and 0.5 < block.drop_path < 0.9
    x = torch.randn(16, 192, 3, 5)
    torch.manual_seed(1)
    changed = (block(x) != x).flatten(1).any(1)
    assert changed.any() and not changed.all()
    block.eval()
    assert (block(x) != x).flatten(1).any(1).all()


def test_a_few_steps_learn_two_boxes():
    model = small("efficientdet_lite0", image_size=(64, 64), fpn_cells=1, head_repeats=1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    x = torch.zeros(2, 3, 64, 64)
    x[0, 0, 7:40, 9:42] = 2.0
    x[1, 2, 19:58, 23:60] = 2.0
    # Off the centers of anchors: a coordinate whose delta is exactly zero is left out of the box loss.
    gt_boxes = torch.tensor([[[9.0, 7.0, 42.0, 40.0]], [[23.0, 19.0, 60.0, 58.0]]])
    gt_labels = torch.tensor([[3], [1]])
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        outputs = model(x)
        loss = model.loss(outputs, gt_boxes, gt_labels).total
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.25 * losses[0]
    detections = model.detect(outputs)
    assert detections.labels[:, 0].tolist() == [3, 1]
    overlaps = pairwise_iou(detections.boxes[:, 0], gt_boxes[:, 0]).diagonal()
    assert (overlaps > 0.6).all(), overlaps


def test_blocks_computed_twice_compile_to_the_same_step():
    """Gradients and running statistics, without a graph break."""

    def block():
        return nn.Sequential(SeparableConv2d(4, 4), BatchNormAct2d(4, activation="silu"))

    plain = BlockSequence(block(), block(), recompute=True)
    compiled = copy.deepcopy(plain)
    x = torch.randn(2, 4, 6, 6)
    for model, run in ((plain, plain), (compiled, torch.compile(compiled, fullgraph=True, backend="aot_eager"))):
        run(x).square().mean().backward()
        assert model[0][1].num_batches_tracked == 1
    for parameter, expected in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)
    torch.testing.assert_close(compiled.state_dict(), plain.state_dict())
