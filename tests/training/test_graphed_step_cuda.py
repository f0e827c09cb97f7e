"""What only a GPU can show of a captured step: that it is captured, and that its replays are the eager steps."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from effdet_fast.training import GraphedStep, ModelEma, TrainingStep, train
from effdet_fast.training.graphed_step import WARMUP_STEPS
from effdet_fast.training.optimizer import create_optimizer, set_learning_rate
from effdet_fast.training.seeding import algorithm_choice, seed_step
from tests.checks import all_equal
from tests.generated_data import make_dataset
from tests.training.test_graphed_step import assert_same
from tests.training.test_step import batches, real, tiny

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

OBJECTS = (3, 8, 0, 5, 2, 6, 9, 16, 1, 4, 12, 3, 7)  # 9 and more want a second graph, with room for 16


@pytest.fixture(autouse=True)
def _deterministic():
    with algorithm_choice(True):
        yield


def twins(build, optimizer, **options):
    """A graphed step and an eager one, of two equal models."""
    for kind in (GraphedStep, TrainingStep):
        model = build().cuda().to(memory_format=torch.channels_last)
        made = create_optimizer(model, name=optimizer, lr=0.05, weight_decay=1e-4)
        yield kind(model, made, clip_grad_norm=1.0, ema=ModelEma(model, 0.9), **options)


def on_gpu(batch):
    images, *objects = (tensor.cuda() for tensor in batch)
    return images.to(memory_format=torch.channels_last), *objects


def take(step, objects=OBJECTS, size=None):
    losses = []
    for i, batch in enumerate(batches(size or step.detector.config.image_size, 3, objects)):
        seed_step(7, i, 0)
        set_learning_rate(step.optimizer, 0.1 / (i + 1))
        losses.append(step(*on_gpu(batch)))
    return losses


def told(caught):
    return sum("without a CUDA graph" in str(warning.message) for warning in caught)


@pytest.mark.parametrize(("amp", "optimizer"), [("none", "sgd"), ("bf16", "adamw"), ("fp16", "sgd")])
@pytest.mark.parametrize("build", [tiny, real, lambda: real("efficientdet_d0", gradient_checkpointing=True)])
def test_replays_are_the_eager_steps(build, amp, optimizer):
    """Losses, weights, statistics and averages, with drop path, a schedule and other numbers of objects."""
    graphed, eager = twins(build, optimizer, amp=amp)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without a CUDA graph.*")
        results = take(graphed), take(eager)
    assert graphed.fallback_reason is None and graphed._captured is not None
    assert graphed._captured.batch.gt_labels.shape[1] == 16
    for i, (actual, wanted) in enumerate(zip(*results, strict=True)):
        assert all_equal(actual, wanted), i
    assert_same(graphed, eager)


def test_a_replay_never_waits_for_the_gpu():
    graphed, _ = twins(tiny, "sgd", amp="bf16")
    take(graphed, (2,) * (WARMUP_STEPS + 1))
    batch = on_gpu(next(batches((32, 32), 3, (2,))))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(3):
            set_learning_rate(graphed.optimizer, 0.1 / (step + 1))
            graphed(*batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert graphed._captured is not None


def test_a_non_finite_loss_moves_no_weight_in_a_replay():
    graphed, _ = twins(tiny, "sgd")
    take(graphed, (2,) * (WARMUP_STEPS + 1))
    images, *objects = on_gpu(next(batches((32, 32), 3, (2,))))
    weight = graphed.detector.head.weight
    before = weight.clone()
    losses = graphed(images * float("inf"), *objects)
    assert not losses.total.isfinite() and torch.equal(weight, before)


def test_a_step_that_waits_falls_back():
    graphed, eager = twins(tiny, "sgd")
    for step in (graphed, eager):
        step.detector.on_loss = lambda call: float(torch.ones((), device="cuda").mul(2).item())
    with pytest.warns(UserWarning, match="the step waits for the GPU") as caught:
        results = take(graphed), take(eager)
    assert told(caught) == 1 and graphed._captured is None
    assert all_equal(*results)
    assert_same(graphed, eager)


def test_a_capture_that_fails_falls_back():
    graphed, eager = twins(tiny, "sgd", amp="fp16")

    def refuse(call):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("not in a graph")

    graphed.detector.on_loss = refuse
    with pytest.warns(UserWarning, match=r"its capture failed \(RuntimeError: not in a graph\)") as caught:
        results = take(graphed), take(eager)
    assert told(caught) == 1
    assert all_equal(*results)
    assert_same(graphed, eager)


def test_another_image_shape_runs_eagerly_with_one_warning():
    graphed, eager = twins(tiny, "sgd")
    for step in (graphed, eager):
        take(step, (2,) * (WARMUP_STEPS + 2))
        if step is graphed:
            with pytest.warns(UserWarning, match=r"images have shape \[2, 3, 64, 32\]") as caught:
                take(step, (2, 2), (64, 32))
            assert told(caught) == 1
        else:
            take(step, (2, 2), (64, 32))
        take(step, (2, 2))
    assert graphed.fallback_reason is None
    assert_same(graphed, eager)


def test_a_loaded_optimizer_leads_to_a_new_capture():
    graphed, eager = twins(tiny, "adamw")
    for step in (graphed, eager):
        take(step, (2,) * (WARMUP_STEPS + 2))
        if step is graphed:
            first = step._captured
        step.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
        take(step, (2,) * (WARMUP_STEPS + 2))
    assert graphed._captured is not None and graphed._captured is not first
    assert_same(graphed, eager)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_with_a_graph_is_the_run_without(tmp_path, workers):
    pytest.importorskip("pycocotools", reason="the run evaluates")
    images, annotations = make_dataset(tmp_path / "data", images=8)
    options = {"train_images": images, "train_annotations": annotations, "image_size": 128, "batch_size": 2}
    options |= {"val_images": images, "val_annotations": annotations, "workers": workers, "device": "cuda"}
    options |= {"model": "efficientdet_lite0", "amp": "bf16", "progress": False, "epochs": 3}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without a CUDA graph.*")
        runs = [train(output=tmp_path / str(graph), cuda_graph=graph, **options) for graph in (False, True)]
    a, b = (torch.load(run.last, weights_only=True) for run in runs)
    for key in ("model", "sums"):
        left, right = a["training"][key], b["training"][key]
        assert all(torch.equal(torch.as_tensor(value), torch.as_tensor(right[name])) for name, value in left.items())
    assert all_equal(a["state_dict"], b["state_dict"])
