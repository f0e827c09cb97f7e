"""A training script written for effdet, with one line more: the same losses step by step, the same detections afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from effdet.bench import DetBenchPredict, DetBenchTrain

import effdet_fast
from tests.acceleration.effdet_benches import CLASSES, images, model_of, targets, tiny

STEPS, BATCH = 5, 4


def train(bench, size, *, lr=0.01, layout=torch.contiguous_format, dtype=torch.float32, autocast=False, labeled=None):
    """effdet's loop: `output = bench(input, target)`, `output['loss'].backward()`. Another batch each step; drop path seeded."""
    torch.manual_seed(5)
    optimizer = torch.optim.SGD(bench.parameters(), lr=lr, momentum=0.9, weight_decay=4e-5)
    bench.train()
    losses = []
    for step in range(STEPS):
        input = images(BATCH, size, seed=step).to(dtype=dtype, memory_format=layout)
        target = targets(BATCH, size, seed=step)
        if labeled is not None:
            target = labeled(target)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = bench(input, target)
        optimizer.zero_grad()
        output["loss"].backward()
        torch.nn.utils.clip_grad_norm_(bench.parameters(), 10.0)
        optimizer.step()
        losses.append(torch.stack([output[name] for name in ("loss", "class_loss", "box_loss")]).detach())
    return torch.stack(losses)


def runs(model, size, create_labeler=True, **options):
    """The losses of the accelerated and of the plain run, and both benches after them."""
    plain = DetBenchTrain(model, create_labeler=create_labeler)
    ours = copy.deepcopy(plain)
    assert len(effdet_fast.accelerate(ours).swapped) > 20
    return train(ours, size, **options), train(plain, size, **options), ours, plain


def assert_losses(losses, expected, tolerance):
    assert (expected[:, 2] > 0).all() and expected.std(0)[0] > 0.01 * expected.mean(0)[0]
    difference = ((losses - expected).abs() / expected).max()
    assert difference <= tolerance, f"losses differ by {difference:.2e}"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_training_loop(layout):
    size = (128, 128)
    losses, expected, ours, plain = runs(tiny(size=size).to(memory_format=layout), size, layout=layout)
    assert_losses(losses, expected, 1e-5)
    for (name, value), theirs in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(value, theirs, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tf_efficientdet_d0", "efficientdet_d0", "tf_efficientdet_lite0"])
def test_a_training_loop_of_a_whole_model(name):
    """In float64 but for what effdet's loss rounds: in float32, two of effdet's own runs that begin a last bit apart part too."""
    size = (128, 128)
    model = model_of(name, size, num_classes=CLASSES).double()
    losses, expected, *_ = runs(model, size, lr=1e-3, dtype=torch.float64)
    assert_losses(losses, expected, 1e-5)


def test_a_loop_with_autocast():
    size = (128, 128)
    losses, expected, *_ = runs(tiny(size=size), size, autocast=True)
    assert_losses(losses, expected, 0.02)


def test_a_loop_with_labels_from_the_loader():
    size = (128, 128)
    model = tiny(size=size)
    labeler = DetBenchTrain(model).anchor_labeler

    def labeled(target):
        classes, deltas, positives = labeler.batch_label_anchors(target["bbox"], target["cls"])
        levels = {f"label_cls_{i}": x for i, x in enumerate(classes)} | {
            f"label_bbox_{i}": x for i, x in enumerate(deltas)
        }
        return {**target, **levels, "label_num_positives": positives}

    losses, expected, *_ = runs(model, size, create_labeler=False, labeled=labeled)
    assert_losses(losses, expected, 1e-5)


def test_evaluation_and_checkpoints_between_the_two():
    """An accelerated run's weights in a plain bench detect the same, in its order; effdet evaluates both ways."""
    size = (128, 128)
    ours = DetBenchTrain(tiny(size=size))
    effdet_fast.accelerate(ours)
    train(ours, size)
    plain = DetBenchTrain(tiny(size=size))
    plain.load_state_dict(ours.state_dict())
    x, target = images(2, size), targets(2, size)
    with torch.no_grad():
        found, expected = ours.eval()(x, target), plain.eval()(x, target)
        assert list(found) == list(expected) == ["loss", "class_loss", "box_loss", "detections"]
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-2 if name == "detections" else 1e-5)
        predict = DetBenchPredict(ours.model).eval()
        effdet_fast.accelerate(predict)
        info = {"img_scale": target["img_scale"], "img_size": target["img_size"]}
        assert torch.equal(predict(x, info), found["detections"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tf_efficientdet_d0", "efficientdet_lite0"])
def test_a_whole_training_bench_compiles_without_a_graph_break(name):
    size = (128, 128)
    model = model_of(name, size, num_classes=CLASSES, backbone_args={"drop_path_rate": 0.0}).double()
    bench = DetBenchTrain(model)
    effdet_fast.accelerate(bench)
    compiled = copy.deepcopy(bench)
    losses = train(torch.compile(compiled, backend="aot_eager", fullgraph=True), size, lr=1e-3, dtype=torch.float64)
    assert_losses(losses, train(bench, size, lr=1e-3, dtype=torch.float64), 1e-5)
