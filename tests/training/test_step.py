"""The step against loops written out by hand, and what it must not do on a GPU."""

from __future__ import annotations

import contextlib
import copy
import math
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from effdet_fast.models import create_model
from effdet_fast.training import ModelEma, TrainingStep
from effdet_fast.training.optimizer import DeviceLearningRates, create_optimizer
from tests.generated_data import random_objects
from tests.training.host_reads import NoHostRead, NoHostTensor
from tests.training.tiny_detector import TinyConfig, TinyDetector

SIZE = (64, 96)


def tiny() -> TinyDetector:
    torch.manual_seed(0)
    return TinyDetector(TinyConfig()).train()


def real(name: str = "efficientdet_lite0", **options) -> nn.Module:
    torch.manual_seed(0)
    small = {"image_size": SIZE, "fpn_cells": 1, "head_repeats": 1, "fpn_channels": 32}
    return create_model(name, 5, **small, **options).train()


def batches(size: tuple[int, int], classes: int, objects: tuple[int, ...]):
    for seed, count in enumerate(objects):
        torch.manual_seed(seed)
        yield torch.randn(2, 3, *size), *random_objects(2, count, size, classes)


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True),
    "adamw-fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
}


@pytest.mark.parametrize(
    ("build", "name", "amp"),
    [(tiny, "sgd", "none"), (tiny, "sgd", "bf16"), (tiny, "adamw-fused", "none"), (real, "adamw-fused", "bf16")],
)
def test_is_the_loop_written_by_hand(build, name, amp):
    ours, theirs = build(), build()
    average = copy.deepcopy(theirs)
    optimizers = [OPTIMIZERS[name](model.parameters()) for model in (ours, theirs)]
    step = TrainingStep(ours, optimizers[0], clip_grad_norm=0.7, ema=ModelEma(ours, 0.15), amp=amp)
    for i, (images, gt_boxes, gt_labels) in enumerate(batches(ours.config.image_size, 3, (3, 1, 4, 2, 3))):
        torch.manual_seed(i)
        losses = step(images, gt_boxes, gt_labels)
        torch.manual_seed(i)
        with torch.autocast("cpu", torch.bfloat16) if amp == "bf16" else contextlib.nullcontext():
            expected = theirs.loss(theirs(images), gt_boxes, gt_labels)
        expected.total.backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.7)
        optimizers[1].step()
        optimizers[1].zero_grad()
        with torch.no_grad():
            decay = min(0.15, (2 + i) / (11 + i))
            for mean, parameter in zip(average.parameters(), theirs.parameters(), strict=True):
                mean.mul_(decay).add_(parameter, alpha=1 - decay)
        for actual, wanted in zip(losses, (expected.total, expected.cls, expected.box, norm), strict=True):
            assert torch.equal(actual, wanted) and not actual.requires_grad
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    for actual, wanted in zip(step.ema.module.parameters(), average.parameters(), strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize(
    ("model", "name", "amp"),
    [
        ("efficientdet_d0", "sgd", "fp16"),
        ("efficientdet_lite0", "adamw", "bf16"),
        pytest.param("retinanet_resnet18_fpn", "adamw", "fp16", marks=pytest.mark.slow),
        ("retinanet_resnet18_fpn_v2", "sgd", "none"),
    ],
)
def test_reads_nothing_back_and_sends_no_constant(monkeypatch, model, name, amp):
    """Neither of them is possible while a CUDA graph is captured. The second step, as the first makes what stays."""
    detector = real(model)
    optimizer = create_optimizer(detector, name=name, lr=0.01, weight_decay=1e-4)
    step = TrainingStep(detector, optimizer, clip_grad_norm=10.0, ema=ModelEma(detector, 0.9), amp=amp)
    first, second = batches(SIZE, 5, (3, 2))
    step(*first)
    step.prepare()
    for name, module in list(sys.modules.items()):
        if name.startswith("effdet_fast.") and hasattr(module, "may_read_values"):
            monkeypatch.setattr(module, "may_read_values", lambda x: False)  # as on a GPU
    with NoHostRead():
        step.compute(*second)


@pytest.mark.parametrize(("model", "name"), [("efficientdet_lite0", "sgd"), ("retinanet_resnet18_fpn", "adamw")])
def test_all_of_a_step_but_backward_stays_on_the_gpu(monkeypatch, model, name):
    """On fake tensors, which know shapes and devices only; backward would want a GPU, and the fused kernels know no fakes."""
    updates = []

    def update(*args, **kwargs):
        updates.append(all(x.device.type == "cuda" for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)))

    monkeypatch.setattr(torch, f"_fused_{name}_", update)
    with FakeTensorMode(), torch.device("cuda"):
        detector = real(model)

        def backward(loss):
            for parameter in detector.parameters():
                parameter.grad = torch.zeros_like(parameter)

        monkeypatch.setattr(torch.Tensor, "backward", backward)
        optimizer = create_optimizer(detector, name=name, lr=0.01, weight_decay=1e-4)
        rates = DeviceLearningRates(optimizer, torch.device("cuda", 0))
        step = TrainingStep(detector, optimizer, clip_grad_norm=10.0)
        assert step.device.type == "cuda"
        batch = torch.zeros(2, 3, *SIZE), torch.zeros(2, 4, 4), torch.zeros(2, 4, dtype=torch.int64)
        detector.anchors()  # made once, and sent
        optimizer.param_groups[0]["lr"] = 0.02
        rates.take_over()
        step.prepare()
        with NoHostTensor():
            losses = step.compute(*batch)
    assert all(loss.device.type == "cuda" and loss.shape == () for loss in losses)
    assert updates == [True, True]  # two groups of parameters


def test_a_host_read_and_a_new_constant_are_found():
    for bad in (lambda: torch.ones(1).item(), lambda: torch.ones(3)[torch.ones(3) > 0]):
        with pytest.raises(AssertionError, match="makes the host wait"), NoHostRead():
            bad()
    with pytest.raises(AssertionError, match="brings a constant"), NoHostRead():
        torch.tensor([1.0, 2.0])
    with FakeTensorMode(), pytest.raises(AssertionError, match="has a tensor of the host"), NoHostTensor():
        torch.zeros(2).to("cuda")


@pytest.mark.parametrize(("name", "amp"), [("sgd", "none"), ("adamw", "none"), ("sgd", "fp16")])
def test_a_non_finite_loss_moves_no_weight(name, amp):
    model = tiny()
    model.on_loss = lambda call: math.inf if call == 1 else None
    step = TrainingStep(model, create_optimizer(model, name=name, lr=0.1, weight_decay=0.0), amp=amp)
    moved = []
    for images, gt_boxes, gt_labels in batches((32, 32), 3, (2, 2, 2)):
        before = [parameter.clone() for parameter in model.parameters()]
        losses = step(images, gt_boxes, gt_labels)
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)))
        assert losses.total.isfinite() == losses.grad_norm.isfinite() == moved[-1]
    assert moved == [True, False, True]


def test_gradients_of_others_are_not_taken_in():
    model, twin = tiny(), tiny()
    for detector in (model, twin):
        step = TrainingStep(detector, torch.optim.SGD(detector.parameters(), lr=0.1))
        if detector is twin:
            detector.head.weight.grad = torch.ones_like(detector.head.weight)
        torch.manual_seed(0)
        step(*next(batches((32, 32), 3, (2,))))
        assert all(parameter.grad is None for parameter in detector.parameters())
    assert torch.equal(model.head.weight, twin.head.weight)


def test_bad_arguments_are_named():
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"TrainingStep: model must have a method loss\(.*got Conv2d"):
        TrainingStep(nn.Conv2d(3, 3, 1), optimizer)
    with pytest.raises(TypeError, match="ema must be a ModelEma or None, got float"):
        TrainingStep(model, optimizer, ema=0.9)
    with pytest.raises(ValueError, match="clip_grad_norm must be at least 0, got nan"):
        TrainingStep(model, optimizer, clip_grad_norm=math.nan)
    with pytest.raises(ValueError, match="amp must be one of none, bf16, fp16, got 'half'"):
        TrainingStep(model, optimizer, amp="half")
    with pytest.raises(ValueError, match="model must have a parameter that requires a gradient"):
        TrainingStep(model.requires_grad_(False), optimizer)
