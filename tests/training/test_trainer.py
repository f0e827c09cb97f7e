"""The training loop on a tiny detector: resuming, interruption, non-finite losses."""

import csv
import json
import math
import os
import signal
import warnings

import pytest
import torch

from effdet_fast.training import NonFiniteLoss, run, train
from effdet_fast.training.optimizer import WarmupCosine
from effdet_fast.training.trainer import Trainer
from tests.training.conftest import BATCH, IMAGES, STEPS
from tests.training.host_reads import NoHostRead


def _load(path):
    return torch.load(path, weights_only=True)


def _same(a, b, where="", ignored=("config", "images_per_second", "seconds")):
    """Every value of two checkpoints is equal bit for bit, other than the time it took."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in ignored:
                _same(a[key], b[key], f"{where}.{key}", ignored)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            _same(x, y, f"{where}[{i}]", ignored)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    else:
        assert a == b, where


def _rows(output):
    with open(output / "results.csv") as file:
        return list(csv.DictReader(file))


def _interrupt_at(call, number=signal.SIGINT):
    def prepare(model):
        model.on_loss = lambda i: os.kill(os.getpid(), number) if i == call else None

    return prepare


@pytest.mark.parametrize(
    "options",
    [{}, {"optimizer": "adamw", "lr": 0.01, "amp": "bf16"}, {"amp": "fp16"}, {"ema_decay": 0.0, "workers": 2}],
    ids=["sgd", "adamw-bf16", "fp16", "no-ema-workers"],
)
@pytest.mark.parametrize("call", [STEPS - 1, STEPS + 1], ids=["end-of-epoch", "mid-epoch"])
def test_an_interrupted_and_resumed_run_ends_with_the_same_bits(start, tmp_path, options, call):
    straight = start(tmp_path / "straight", epochs=3, **options)
    assert (straight.epochs, straight.steps, straight.signal) == (3, 3 * STEPS, None)
    start.prepare = _interrupt_at(call)
    stopped = start(tmp_path / "resumed", epochs=3, **options)
    assert (stopped.signal, stopped.steps) == (signal.SIGINT, call + 1)
    start.prepare = lambda model: None
    resumed = start(None, resume=stopped.last)
    assert (resumed.epochs, resumed.steps, resumed.output) == (3, 3 * STEPS, tmp_path / "resumed")
    _same(_load(straight.last), _load(resumed.last))
    _same(_load(straight.best), _load(resumed.best))
    assert [row["loss"] for row in _rows(straight.output)] == [row["loss"] for row in _rows(resumed.output)]


def test_steps_that_the_scaler_skips_do_not_move_the_schedule(start, tmp_path):
    def overflow(model):
        model.on_loss = lambda call: 1e7 if call < 3 else os.kill(os.getpid(), signal.SIGINT) if call == stop else None

    stop, options = None, {"epochs": 12, "amp": "fp16", "lr": 0.01, "val_images": None, "val_annotations": None}
    start.prepare = overflow
    straight = start(tmp_path / "straight", **options)
    assert _load(straight.last)["training"]["skipped"] == [0, 1, 2]
    rates = [float(row["lr"]) for row in _rows(straight.output)]
    schedule = WarmupCosine(0.01, STEPS, 12 * STEPS)
    assert rates == [
        pytest.approx(schedule(step if step < 40 else step - 3)) for step in range(STEPS - 1, 12 * STEPS, STEPS)
    ]
    stop = 42
    stopped = start(tmp_path / "resumed", **options)
    start.prepare = lambda model: None
    _same(_load(straight.last), _load(start(None, resume=stopped.last).last))


def test_two_runs_with_one_seed_agree_and_another_seed_differs(start, tmp_path):
    a, b, c = (start(tmp_path / name, epochs=1, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    _same(_load(a.last), _load(b.last))
    assert not torch.equal(_load(a.last)["state_dict"]["head.weight"], _load(c.last)["state_dict"]["head.weight"])


def test_a_signal_during_an_evaluation_does_not_wait_for_it(start, tmp_path):
    straight = start(tmp_path / "straight", epochs=2)
    detections = []

    def prepare(model):
        model.on_detect = lambda: (detections.append(1), os.kill(os.getpid(), signal.SIGTERM))

    start.prepare = prepare
    stopped = start(tmp_path / "resumed", epochs=2)
    assert (stopped.signal, stopped.epochs, stopped.steps, len(detections)) == (signal.SIGTERM, 0, STEPS, 1)
    start.prepare = lambda model: None
    resumed = start(None, resume=stopped.last)
    _same(_load(straight.last), _load(resumed.last))


def test_what_a_run_leaves_behind(start, tmp_path):
    result = start(tmp_path / "run", epochs=3, eval_every=2)
    assert sorted(entry.name for entry in result.output.iterdir()) == [
        "best.pt",
        "config.json",
        "last.pt",
        "results.csv",
    ]
    best = _load(result.best)
    assert best["format"] == 1 and best["model"] == "tiny"
    assert best["class_names"] == ["shape_0", "shape_1", "shape_2"] and best["category_ids"] == [3, 7, 40]
    assert best["preprocessing"] == {
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "image_size": [32, 32],
        "depth": None,
    }
    assert "training" not in best and best["metrics"]["AP"] == result.best_ap
    assert json.loads((result.output / "config.json").read_text())["eval_every"] == 2
    rows = _rows(result.output)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [row["step"] for row in rows] == [str(STEPS * (i + 1)) for i in range(3)]
    assert [row["AP"] == "" for row in rows] == [True, False, False]
    assert float(rows[0]["loss"]) == pytest.approx(float(rows[0]["cls_loss"]) + float(rows[0]["box_loss"]))
    assert float(rows[0]["images_per_second"]) > 0


def test_ema_weights_are_the_published_ones(start, tmp_path):
    last = _load(start(tmp_path / "run", epochs=1).last)
    assert not torch.equal(last["state_dict"]["head.weight"], last["training"]["model"]["head.weight"])
    without = _load(start(tmp_path / "without", epochs=1, ema_decay=0.0).last)
    assert torch.equal(without["state_dict"]["head.weight"], last["training"]["model"]["head.weight"])


def test_without_validation_the_last_epoch_is_the_best(start, tmp_path):
    result = start(tmp_path / "run", epochs=2, val_images=None, val_annotations=None)
    assert result.metrics == {} and result.best_ap is None
    assert _load(result.best)["epoch"] == 2
    assert all(row["AP"] == "" for row in _rows(result.output))


@pytest.mark.parametrize("amp", ["none", "fp16"])
def test_a_non_finite_loss_stops_with_its_step_and_images(start, tmp_path, amp):
    models = []

    def prepare(model):
        models.append(model)
        model.on_loss = lambda i: math.nan if i == STEPS + 2 else None

    start.prepare = prepare
    with pytest.raises(NonFiniteLoss) as raised:
        start(tmp_path / "run", epochs=3, amp=amp)
    error = raised.value
    assert error.step == STEPS + 2 and error.what == "loss" and str(error).endswith("so the weights are still finite")
    assert len(error.image_ids) == BATCH and set(error.image_ids) <= {100 + 3 * i for i in range(IMAGES)}
    failure = json.loads((tmp_path / "run" / "failure.json").read_text())
    assert failure["step"] == error.step and failure["image_ids"] == error.image_ids
    assert all(parameter.isfinite().all() for parameter in models[0].parameters())
    last = _load(tmp_path / "run" / "last.pt")  # of the epoch before
    assert last["training"]["step"] == STEPS
    assert all(value.isfinite().all() for value in last["state_dict"].values() if value.is_floating_point())
    start.prepare = lambda model: None
    assert start(None, resume=tmp_path / "run" / "last.pt").epochs == 3
    assert not (tmp_path / "run" / "failure.json").exists()


def test_a_run_is_not_replaced_unasked_and_nothing_is_made_for_a_mistake(start, tmp_path):
    first = start(tmp_path / "run", epochs=1)
    before = first.last.read_bytes()
    with pytest.raises(ValueError, match="already holds a run .*--resume .*--overwrite"):
        start(tmp_path / "run", epochs=1)
    assert first.last.read_bytes() == before
    assert start(tmp_path / "run", epochs=2, overwrite=True).epochs == 2
    with pytest.raises(FileNotFoundError):
        start(tmp_path / "new", train_images=tmp_path / "absent")
    assert not (tmp_path / "new").exists()


def test_what_a_resumed_run_cannot_do_is_said(start, tmp_path, data):
    done = start(tmp_path / "run", epochs=1)
    with pytest.raises(ValueError, match="has finished 1 epochs of 1"):
        start(None, resume=done.last)
    with pytest.raises(ValueError, match="resume from the run's last.pt"):
        start(None, resume=done.best)
    with pytest.raises(ValueError, match="3 images per step; now it would be batch_size 2 x 1 processes = 2"):
        start(None, resume=done.last, epochs=2, batch_size=2)
    with pytest.raises(ValueError, match="was trained on other data"):
        start(
            None,
            resume=done.last,
            epochs=2,
            train_images=data["val_images"],
            train_annotations=data["val_annotations"],
        )
    with pytest.raises(ValueError, match="cannot change optimizer"):
        start(None, resume=done.last, epochs=2, optimizer="adamw")
    with pytest.warns(UserWarning, match="1 -> 2 epochs"):
        longer = start(tmp_path / "longer", resume=done.last, epochs=2)
    assert (longer.epochs, longer.output) == (2, tmp_path / "longer")
    assert [row["epoch"] for row in _rows(tmp_path / "longer")] == ["1", "2"]
    assert [row["epoch"] for row in _rows(tmp_path / "run")] == ["1"]


def test_frozen_parts_stay_and_the_rest_learns(start, tmp_path):
    initial = {}

    def prepare(model):
        initial.update({name: value.clone() for name, value in model.state_dict().items()})

    start.prepare = prepare
    for option, kept in (("freeze_backbone", "backbone."), ("freeze_bn", "backbone.1.")):
        result = start(tmp_path / option, epochs=1, ema_decay=0.0, **{option: True})
        for name, value in _load(result.last)["state_dict"].items():
            assert torch.equal(value, initial[name]) == name.startswith(kept), (option, name)


def test_bn_momentum_reaches_every_layer(start, tmp_path):
    models = []
    start.prepare = models.append
    start(tmp_path / "run", epochs=1, bn_momentum=0.3)
    assert models[0].backbone[1].momentum == 0.3


@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_never_reads_from_the_device(start, tmp_path, monkeypatch, amp, optimizer):
    step, seen = Trainer._train_step, []

    def watched(self, batch):
        with NoHostRead():
            step(self, batch)
        seen.append(1)

    monkeypatch.setattr(Trainer, "_train_step", watched)
    start(tmp_path / "run", epochs=1, amp=amp, optimizer=optimizer, val_images=None, val_annotations=None)
    assert len(seen) == STEPS
    with pytest.raises(AssertionError, match="makes the host wait"), NoHostRead():
        torch.ones(1).item()


def test_a_cuda_graph_that_cannot_be_is_named_and_changes_nothing(start, tmp_path):
    plain = start(tmp_path / "plain", epochs=1)
    with pytest.warns(UserWarning, match="run without a CUDA graph: "):
        asked = start(tmp_path / "asked", epochs=1, cuda_graph=True)
    _same(_load(plain.last), _load(asked.last))


def test_options_as_a_config_and_both_at_once(start, data, tmp_path):
    config = run.TrainConfig(
        **data, model="tiny", batch_size=BATCH, workers=0, progress=False, epochs=1, output=tmp_path / "run"
    )
    assert train(config).epochs == 1
    with pytest.raises(TypeError, match="either a TrainConfig or options"):
        train(config, epochs=2)


def test_tensorboard_is_asked_for_by_name_when_missing(start, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with warnings.catch_warnings(), pytest.raises(ValueError, match=r"pip install effdet_fast\[tensorboard\]"):
        start(tmp_path / "run", epochs=1, tensorboard=True)


def test_the_screen_shows_the_run_and_its_epochs(start, tmp_path, capsys):
    start(tmp_path / "run", epochs=1, progress=True)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "tiny at 32 x 32 px on cpu: 10 images, 3 classes, 4 steps of 3 images per epoch"
    assert out[1].startswith("epoch 1/1  loss ") and " AP " in out[1] and "img/s" in out[1]


@pytest.mark.parametrize("broken", ["images", "categories"])
def test_a_file_with_nothing_to_train_on_is_named(start, tmp_path, data, broken):
    content = json.loads(data["train_annotations"].read_text())
    content |= {"annotations": [], broken: []}
    (tmp_path / "empty.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"empty.json.* {broken}"):
        start(tmp_path / "run", train_annotations=tmp_path / "empty.json")
