"""What of a captured step any machine can show: falling back, padding, what leads to a new capture."""

from __future__ import annotations

import contextlib
import copy
import re
import textwrap
import warnings

import pytest
import torch
from torch import nn

import effdet_fast
from effdet_fast.training import GraphedStep, ModelEma, TrainingStep, graphed_step
from effdet_fast.training.graphed_step import MAX_CHANGES, WARMUP_STEPS, StaticBatch
from effdet_fast.training.optimizer import create_optimizer, set_learning_rate, why_not_capturable
from effdet_fast.training.seeding import seed_step
from tests.checks import all_equal
from tests.generated_data import random_objects
from tests.training.test_step import SIZE, batches, real, tiny


class Replayed(GraphedStep):
    """Its graph computes the step on the static batch each time, which is what a replay does; counted in `replays`."""

    captures = replays = 0

    def _why_not(self):
        return why_not_capturable(self.optimizer)

    def _on_stream(self):
        return contextlib.nullcontext()

    def _watch(self):
        return contextlib.nullcontext([])

    def _capture(self, *batch):
        self.captures += 1
        static, losses = StaticBatch(*batch, self._rows), torch.zeros(4)
        step = self

        class Graph:
            def replay(self):
                step.replays += 1
                losses.copy_(torch.stack(step.compute(static.images, static.gt_boxes, static.gt_labels)))

        return graphed_step._Captured(Graph(), static, losses)


def twins(build, name, **options):
    """A replayed step and a plain one, of two equal models."""
    for kind in (Replayed, TrainingStep):
        model = build()
        optimizer = create_optimizer(model, name=name, lr=0.05, weight_decay=1e-4)
        yield kind(model, optimizer, clip_grad_norm=1.0, ema=ModelEma(model, 0.9), **options)


def assert_same(a, b):
    for part in ("detector", "ema"):
        left, right = getattr(a, part).state_dict(), getattr(b, part).state_dict()
        assert all_equal(left, right)


@pytest.mark.parametrize(
    ("build", "name", "amp"),
    [
        (tiny, "sgd", "fp16"),
        (tiny, "adamw", "none"),
        (real, "sgd", "none"),
        pytest.param(real, "adamw", "bf16", marks=pytest.mark.slow),
    ],
)
def test_replayed_steps_are_the_plain_ones(build, name, amp):
    """With other learning rates, random numbers and numbers of objects at each step; 9 of them make room for 16."""
    replayed, plain = twins(build, name, amp=amp)
    kept = []
    for i, batch in enumerate(batches(plain.detector.config.image_size, 3, (3, 8, 0, 5, 2, 9, 16, 1, 2, 12, 3))):
        results = []
        for step in (replayed, plain):
            seed_step(7, i, 0)
            set_learning_rate(step.optimizer, 0.1 / (i + 1))
            results.append(step(*batch))
        kept.append(results)
    assert replayed.fallback_reason is None
    assert (replayed.captures, replayed.replays) == (2, 2 + 3)  # steps 3, 4 and 8, 9, 10
    for i, (actual, wanted) in enumerate(kept):  # read only now: a replay leaves earlier losses alone
        assert all_equal(actual, wanted), i
    assert_same(replayed, plain)


@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_without_a_gpu_one_warning_says_so_and_steps_are_eager(amp):
    models = tiny(), tiny()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in models]
    with pytest.warns(
        UserWarning, match="steps run without a CUDA graph: (PyTorch .* sees no GPU|the model is on cpu)$"
    ):
        graphed = GraphedStep(models[0], optimizers[0], clip_grad_norm=1.0, amp=amp)
    plain = TrainingStep(models[1], optimizers[1], clip_grad_norm=1.0, amp=amp)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i, batch in enumerate(batches((32, 32), 3, (1, 9, 2, 3, 4))):
            results = []
            for step in (graphed, plain):
                torch.manual_seed(i)
                results.append(step(*batch))
            assert all_equal(*results)
    assert isinstance(optimizers[0].param_groups[0]["lr"], float)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [0, 32])
@pytest.mark.parametrize("objects", [0, 1, 8, 9])
def test_padding_changes_no_bit_of_the_loss(objects, rows):
    model = real()
    images = torch.randn(3, 3, *SIZE).to(memory_format=torch.channels_last)
    boxes, labels = random_objects(3, objects, SIZE, 5)
    crowded = random_objects(3, 16, SIZE, 5, seed=1)
    batch = StaticBatch(images, *crowded, rows)
    batch.fill(images, boxes, labels)
    assert batch.gt_labels.shape == (3, max(rows, 16)) and (batch.gt_labels[:, objects:] == -1).all()
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    outputs = model(images)
    expected, actual = model.loss(outputs, boxes, labels), model.loss(outputs, batch.gt_boxes, batch.gt_labels)
    assert all_equal(actual, expected)


def run(step, count):
    for batch in batches((32, 32), 3, (2,) * count):
        step(*batch)


def _load_optimizer(step):
    step.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))


CHANGES = {
    "loaded optimizer": _load_optimizer,
    "weight decay": lambda step: step.optimizer.param_groups[0].update(weight_decay=0.1),
    "frozen parameter": lambda step: step.detector.backbone[0].weight.requires_grad_(False),
    "mode": lambda step: step.detector.backbone[1].eval(),
    "moved weights": lambda step: setattr(step.detector.head.weight, "data", step.detector.head.weight.data.clone()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_leads_to_a_new_capture(change):
    replayed, plain = twins(tiny, "sgd")
    for step in (replayed, plain):
        run(step, WARMUP_STEPS + 1)
        CHANGES[change](step)
        run(step, WARMUP_STEPS + 1)
    assert (replayed.captures, replayed.replays) == (2, 2)
    assert_same(replayed, plain)


def test_schedulers_and_assigned_rates_lead_to_none():
    replayed, plain = twins(tiny, "adamw")
    for step in (replayed, plain):
        scheduler = torch.optim.lr_scheduler.ExponentialLR(step.optimizer, 0.5)
        for batch in batches((32, 32), 3, (2,) * 6):
            step(*batch)
            scheduler.step()
        for group in step.optimizer.param_groups:
            group["lr"] = 0.25
        run(step, 2)
    assert (replayed.captures, replayed.replays) == (1, 5)
    for a, b in zip(replayed.detector.parameters(), plain.detector.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)  # the plain one's rates are not rounded to float32
    assert float(replayed.optimizer.param_groups[1]["lr"]) == 0.25


def test_what_changes_at_every_step_ends_the_attempts():
    replayed, _ = twins(tiny, "sgd")
    with pytest.warns(
        UserWarning, match="an option of the optimizer, or a parameter, changes again and again"
    ) as caught:
        for i, batch in enumerate(batches((32, 32), 3, (2,) * (MAX_CHANGES + 3))):
            replayed.optimizer.param_groups[0]["momentum"] = 0.9 - 0.01 * i
            replayed(*batch)
    assert len(caught) == 1 and replayed.captures == 0 and replayed.fallback_reason


def test_another_image_shape_runs_eagerly_with_one_warning():
    replayed, plain = twins(tiny, "sgd")
    for step in (replayed, plain):
        run(step, WARMUP_STEPS + 1)
    small = [(images[:, :, :16], *objects) for images, *objects in batches((32, 32), 3, (2, 2))]
    torch.manual_seed(0)
    with pytest.warns(
        UserWarning, match=r"images have shape \[2, 3, 16, 32\], where the graph has \[2, 3, 32, 32\]"
    ) as caught:
        for batch in small:
            replayed(*batch)
    torch.manual_seed(0)
    for batch in small:
        plain(*batch)
    for step in (replayed, plain):
        run(step, 1)
    assert len(caught) == 1 and (replayed.captures, replayed.replays) == (1, 2) and replayed.fallback_reason is None
    assert_same(replayed, plain)


@pytest.mark.parametrize("amp", ["none", "fp16"])
def test_a_failed_capture_is_named_and_the_step_taken(monkeypatch, amp):
    """Broken off between the scaler's two calls, which must not keep it from the next step."""
    replayed, plain = twins(tiny, "sgd", amp=amp)

    def fail(*batch):
        for parameter in replayed.parameters:
            parameter.grad = torch.ones_like(parameter)
        replayed.scaler.unscale_(replayed.optimizer)
        raise RuntimeError("no room\nat all")

    monkeypatch.setattr(replayed, "_capture", fail)
    with pytest.warns(UserWarning, match=r"its capture failed \(RuntimeError: no room\)$") as caught:
        run(replayed, WARMUP_STEPS + 3)
    run(plain, WARMUP_STEPS + 3)
    assert len(caught) == 1
    assert_same(replayed, plain)
    assert replayed.scaler.state_dict() == plain.scaler.state_dict()


def test_inside_autocast_nothing_is_captured():
    replayed, _ = twins(tiny, "sgd")
    run(replayed, WARMUP_STEPS)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.warns(UserWarning, match="inside torch.autocast.*give amp instead"),
    ):
        run(replayed, 1)
    assert replayed.captures == 0


def test_a_step_that_waits_is_named(monkeypatch):
    replayed, _ = twins(tiny, "sgd")
    monkeypatch.setattr(
        replayed, "_watch", lambda: contextlib.nullcontext(["model.py:7"] if replayed._warm == 3 else [])
    )
    with pytest.warns(UserWarning, match=r"the step waits for the GPU \(model.py:7\)"):
        run(replayed, WARMUP_STEPS + 1)
    assert replayed.captures == 0


def test_objects_of_the_wrong_shape_are_named():
    replayed, _ = twins(tiny, "sgd")
    images, boxes, labels = next(batches((32, 32), 3, (4,)))
    with pytest.raises(ValueError, match=r"Replayed: gt_boxes must have shape \[2, 4, 4\], got \[2, 1, 4\]"):
        replayed(images, boxes[:, :1], labels)
    with pytest.raises(ValueError, match=r"gt_labels must have shape \[2, M\], got \[1, 4\]"):
        replayed(images, boxes[:1], labels[:1])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), "SGD reads .* unless made with fused=True$"),
        (lambda p: torch.optim.AdamW(p), "AdamW reads .* unless made with fused=True or capturable=True$"),
        (lambda p: torch.optim.Rprop(p), "Rprop reads its learning rate on the host unless made with capturable=True$"),
        (lambda p: torch.optim.LBFGS(p), "LBFGS reads its learning rate on the host$"),
        (lambda p: torch.optim.SGD(p, lr=0.1, fused=True), None),
        (lambda p: torch.optim.Adam(p, fused=True), None),
        (lambda p: torch.optim.AdamW(p, capturable=True), None),
    ],
)
def test_which_optimizers_can_be_captured(make, reason):
    found = why_not_capturable(make(nn.Linear(2, 2).parameters()))
    assert found == reason if reason is None else re.match(reason, found)


def test_the_example_of_the_docstring_runs():
    """On the CPU and on a small model: what it says of the GPU is left out."""
    example = re.search(r"```python\n(.*?)\n *```", GraphedStep.__doc__, re.DOTALL)[1]
    small = (
        textwrap.dedent(example)
        .replace(".cuda()", "")
        .replace('"efficientdet_d0"', '"efficientdet_lite0", 5, image_size=64')
    )
    names = {"effdet_fast": effdet_fast, "torch": torch, "ModelEma": ModelEma, "GraphedStep": GraphedStep}
    names["batches"] = list(batches((64, 64), 5, (2, 3)))
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        exec(small, names)
    assert names["losses"].total.isfinite() and names["ema"].updates == 2
