"""Everything that can be put together trains: a falling loss, and a finite gradient for every parameter."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from effdet_fast.models import DetectionModel, create_model, list_models
from effdet_fast.models.config import CHOICES
from effdet_fast.models.necks import NECKS
from effdet_fast.nn import BlockSequence
from tests.generated_data import random_objects

SIZE = (96, 128)
SMALL = {"image_size": SIZE, "fpn_channels": 32, "fpn_cells": 1, "head_repeats": 1, "drop_path_rate": 0.0}
KINDS = [("fpn", "separable"), ("panet", "conv"), ("nas_fpn", "separable"), ("bifpn", "conv")]
QUICK = ("efficientdet_d0", "efficientdet_lite0", "retinanet_resnet18_fpn", "retinanet_resnet18_fpn_v2")
HEADS = list(itertools.product(CHOICES["head"], CHOICES["head_norm"]))


def small(name: str = "efficientdet_lite0", **overrides) -> DetectionModel:
    torch.manual_seed(0)
    return create_model(name, 5, **{**SMALL, **overrides}).train()


def batch(size: tuple[int, int] = SIZE) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    images = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(1))
    return images, random_objects(3, 6, size, 5)


def take_steps(model: DetectionModel, forward=None, layout=torch.contiguous_format, lr: float = 1e-3) -> list[float]:
    """Losses before, between and after three optimizer steps; asserts that every parameter has a finite gradient."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    images, targets = batch(model.config.image_size)
    images = images.to(memory_format=layout)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = (forward or model)(images, targets).total
        loss.backward()
        losses.append(loss.item())
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        optimizer.step()
    with torch.no_grad():
        losses.append(model(images, targets).total.item())
    return losses


def assert_falls(losses: list[float]) -> None:
    assert losses[-1] < 0.98 * losses[0], losses


@pytest.mark.parametrize("fusion", CHOICES["fusion"])
@pytest.mark.parametrize("neck", NECKS)
def test_every_neck_and_fusion_trains(neck, fusion):
    assert_falls(take_steps(small(neck=neck, fusion=fusion)))


@pytest.mark.parametrize(("head", "norm"), HEADS)
def test_every_head_trains(head, norm):
    assert_falls(take_steps(small(head=head, head_norm=norm, head_repeats=2)))


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in list_models()])
def test_every_detector_trains(name):
    """Backbone, neck and heads as released, on small images; BatchNorms not frozen, as nothing was trained before."""
    torch.manual_seed(0)
    model = create_model(name, 5, image_size=SIZE, drop_path_rate=0.0, frozen_batch_norm=False)
    # RetinaNet's wide heads have no BatchNorm that would forgive large steps.
    assert_falls(take_steps(model.train(), lr=1e-4 if name.startswith("retinanet") else 1e-3))


@pytest.mark.parametrize(
    ("name", "frozen"),
    [("efficientdet_d0_symmetric", True), ("retinanet_resnet18_fpn", False), ("retinanet_resnet18_fpn_v2", True)],
)
def test_detectors_train_with_and_without_frozen_batch_norm(name, frozen):
    model = small(name, frozen_batch_norm=frozen)
    statistics = {key: value.clone() for key, value in model.backbone.named_buffers() if "running" in key}
    assert statistics
    assert_falls(take_steps(model))
    for key, value in model.backbone.named_buffers():
        if "running" in key:
            assert torch.equal(value, statistics[key]) == frozen, key


@pytest.mark.parametrize(("neck", "head"), KINDS)
def test_channels_last_trains(neck, head):
    model = small(neck=neck, head=head)
    expected = take_steps(copy.deepcopy(model))
    actual = take_steps(model.to(memory_format=torch.channels_last), layout=torch.channels_last)
    assert actual[0] == pytest.approx(expected[0], rel=1e-4)
    assert_falls(actual)


@pytest.mark.parametrize(("neck", "head"), KINDS)
def test_bf16_autocast_trains(neck, head):
    model = small(neck=neck, head=head, head_norm="batch" if head == "separable" else "group")

    def forward(images, targets):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(images, targets)

    assert_falls(take_steps(model, forward))


@pytest.mark.parametrize(
    ("neck", "head", "norm"),
    [
        pytest.param(neck, *kind, marks=() if (neck, *kind) == ("fpn", "conv", "group") else pytest.mark.slow)
        for neck in NECKS
        for kind in HEADS
    ],
)
def test_compiled_trains_to_the_same_losses(neck, head, norm):
    model = small("retinanet_resnet18_fpn_v2", neck=neck, head=head, head_norm=norm)
    expected = take_steps(copy.deepcopy(model))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def forward(images, targets):
        return model.loss(compiled(images), *targets)

    assert take_steps(model, forward) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["efficientdet_d0", "retinanet_resnet18_fpn_v2"])
def test_recomputed_blocks_change_no_gradient_and_no_statistic(name):
    """Also with random numbers in the blocks, and with part of the model in evaluation mode."""
    plain = small(name, fpn_cells=2, drop_path_rate=0.3)
    recomputing = small(name, fpn_cells=2, drop_path_rate=0.3, gradient_checkpointing=True)
    recomputing.load_state_dict(plain.state_dict())
    assert any(isinstance(module, BlockSequence) and module.recompute for module in recomputing.backbone.modules())
    images, targets = batch()
    results = []
    for model in (plain, recomputing):
        getattr(model.backbone, "layer2" if name.startswith("retinanet") else "blocks")[1].eval()
        torch.manual_seed(2)
        model(images, targets).total.backward()
        results.append({key: parameter.grad for key, parameter in model.named_parameters()})
    for key, gradient in results[0].items():
        assert torch.equal(results[1][key], gradient), key
    for key, value in plain.state_dict().items():
        assert torch.equal(recomputing.state_dict()[key], value), key


def test_recomputed_blocks_hold_less():
    held = {}
    for recompute in (False, True):
        model = small("efficientdet_d0", gradient_checkpointing=recompute)
        sizes: dict[int, int] = {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(*batch()).total
        held[recompute] = sum(sizes.values())
        del loss
    assert held[True] < 0.5 * held[False], held


def test_targets_in_either_form_give_the_same_loss():
    model = small().eval()
    images, (boxes, labels) = batch()
    listed = [{"boxes": b[keep], "labels": k[keep]} for b, k, keep in zip(boxes, labels, labels >= 0, strict=True)]
    assert listed[0]["labels"].numel() == 0
    expected = model.loss(model(images), boxes, labels)
    for targets in ((boxes, labels), listed):
        for actual, wanted in zip(model(images, targets), expected, strict=True):
            assert torch.equal(actual, wanted)


@pytest.mark.parametrize(
    "targets", [torch.zeros(3, 5, 4), [{"boxes": torch.zeros(1, 4)}], (torch.zeros(3, 1, 4), None)]
)
def test_bad_targets(targets):
    with pytest.raises(TypeError, match="targets must be a pair .* or a list with a dict"):
        small()(batch()[0], targets)


def test_predict_is_detect_on_clipped_boxes_of_an_evaluated_model():
    model = small(score_threshold=0.005, max_detections=7, nms_iou=0.3)
    images, _ = batch()
    with pytest.raises(RuntimeError, match="call eval"):
        model.predict(images)
    found = model.eval().predict(images)
    height, width = SIZE
    options = {"score_threshold": 0.005, "max_detections": 7, "iou_threshold": 0.3}
    with torch.no_grad():
        expected = model.detect(model(images), **options, clip_sizes=torch.tensor([[height, width]] * 3).float())
    for actual, wanted in zip(found, expected, strict=True):
        assert torch.equal(actual, wanted) and not actual.requires_grad
    assert found.boxes.shape == (3, 7, 4)
    assert (found.boxes >= 0).all() and (found.boxes <= torch.tensor([width, height, width, height])).all()
