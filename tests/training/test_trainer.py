"""The training loop on a tiny detector: resuming, interruption, non-finite losses."""

import contextlib
import csv
import json
import math
import multiprocessing
import os
import signal
import warnings
import zlib

import pytest
import torch
from torch import nn

from effdet_fast.data.loader import LoaderProcessLost
from effdet_fast.models import create_model
from effdet_fast.training import NonFiniteLoss, TrainConfig, run, run_data, train
from effdet_fast.training.trainer import Trainer
from tests.generated_data import make_dataset
from tests.training.host_reads import NoHostRead
from tests.training.tiny_detector import create_tiny, tiny_config

IMAGES, BATCH = 10, 3
STEPS = 4  # per epoch: the last batch is filled up


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    train_images, train_annotations = make_dataset(folder / "train", images=IMAGES, size=(40, 48))
    val_images, val_annotations = make_dataset(folder / "val", images=5, size=(40, 48), seed=1)
    return {
        "train_images": train_images,
        "train_annotations": train_annotations,
        "val_images": val_images,
        "val_annotations": val_annotations,
    }


@pytest.fixture
def start(data, monkeypatch):
    """`start(output, **options)` trains a tiny detector; `start.prepare(model)` may change each model first."""

    def create(*args, **options):
        model = create_tiny(*args, **options)
        start.prepare(model)
        return model

    def start(output, **options):
        common = {"model": "tiny", "batch_size": BATCH, "workers": 0, "lr": 0.1, "progress": False, "device": "cpu"}
        if options.get("resume"):
            return train(**options, **({"output": output} if output else {}))
        return train(**{**data, **common, "output": output, **options})

    start.prepare = lambda model: None
    monkeypatch.setattr(run, "create_model", create)
    monkeypatch.setattr(run, "model_config", tiny_config)
    monkeypatch.setattr(run_data, "model_config", tiny_config)
    return start


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


@pytest.fixture
def own_data(tmp_path):
    """A data set that a test may change: its folder, its annotations file and that file's content."""
    images, annotations = make_dataset(tmp_path / "own", images=IMAGES, size=(40, 48))
    return images, annotations, json.loads(annotations.read_text())


def _without_validation(own_data):
    images, annotations, _ = own_data
    return {"train_images": images, "train_annotations": annotations, "val_images": None, "val_annotations": None}


def test_a_picture_that_breaks_a_run_can_be_taken_out(start, tmp_path, own_data, capsys):
    images, annotations, content = own_data
    with open(images / "picture_004.png", "r+b") as file:
        file.truncate(3000)
    with pytest.raises(ValueError, match="picture_004.png: cannot be decoded"):
        start(tmp_path / "run", epochs=2, hflip=0.0, **_without_validation(own_data))
    last = _load(tmp_path / "run" / "last.pt")["training"]
    assert (
        f"stopped by an error after {last['step']} steps; to continue: effdet-fast train --resume"
        in capsys.readouterr().err
    )
    content["images"] = [image for image in content["images"] if image["file_name"] != "picture_004.png"]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] in kept]
    annotations.write_text(json.dumps(content))
    with pytest.warns(
        UserWarning, match="images have changed since .*last.pt: 1 removed; the epoch under way starts again"
    ):
        result = start(None, resume=tmp_path / "run" / "last.pt")
    assert (result.epochs, result.steps) == (2, 2 * 3)


def test_changed_boxes_and_names_are_said_and_classes_refused(start, tmp_path, own_data):
    images, annotations, content = own_data
    stopped = start(tmp_path / "run", epochs=1, **_without_validation(own_data))
    content["annotations"][0]["bbox"][0] += 1
    (images / "picture_002.png").rename(images / "renamed.png")
    content["images"][2]["file_name"] = "renamed.png"
    annotations.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="last.pt: 1 with another file name, 1 with other boxes or classes$"):
        start(tmp_path / "longer", resume=stopped.last, epochs=2)
    content["categories"][0]["name"] = "another"
    annotations.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="trained on other classes .*3: 'shape_0'.* than .*3: 'another'"):
        start(tmp_path / "longest", resume=stopped.last, epochs=2)


def test_a_checkpoint_that_knows_only_the_number_of_its_images(start, tmp_path, data):
    done = start(tmp_path / "run", epochs=1)
    content = _load(done.last)
    ids = [100 + 3 * i for i in range(IMAGES)]
    content["training"]["data"] = f"{IMAGES} images, ids crc32 {zlib.crc32(repr(ids).encode()):08x}"
    torch.save(content, done.last)
    assert start(tmp_path / "longer", resume=done.last, epochs=2).epochs == 2
    other = {"train_images": data["val_images"], "train_annotations": data["val_annotations"]}
    with pytest.raises(ValueError, match="was trained on other data"):
        start(tmp_path / "other", resume=done.last, epochs=2, **other)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_goes_on_from_an_error_in_its_data_with_the_same_bits(start, tmp_path, own_data, workers):
    options = {"epochs": 2, "workers": workers, **_without_validation(own_data)}
    straight = start(tmp_path / "straight", **options)
    picture = own_data[0] / "picture_004.png"
    whole = picture.read_bytes()
    picture.write_bytes(whole[:3000])
    with pytest.raises(ValueError, match="picture_004.png: cannot be decoded"):
        start(tmp_path / "run", **options)
    picture.write_bytes(whole)
    _same(_load(straight.last), _load(start(None, resume=tmp_path / "run" / "last.pt").last))


def test_any_error_leaves_a_run_that_can_go_on(start, tmp_path, capsys):
    def prepare(model):
        def fail(call):
            if call == STEPS + 1:
                raise RuntimeError("something unforeseen")

        model.on_loss = fail

    start.prepare = prepare
    with pytest.raises(RuntimeError, match="something unforeseen"):
        start(tmp_path / "run", epochs=2)
    assert f"stopped by an error after {STEPS + 1} steps" in capsys.readouterr().err
    start.prepare = lambda model: None
    assert start(None, resume=tmp_path / "run" / "last.pt").steps == 2 * STEPS


def test_a_lost_data_loading_process_is_told_in_a_sentence(start, tmp_path):
    def prepare(model):
        def kill(call):
            if call == 1:
                for child in multiprocessing.active_children():
                    child.kill()

        model.on_loss = kill

    start.prepare = prepare
    with pytest.raises(LoaderProcessLost, match="a data-loading process ended by signal 9, .*: use fewer --workers"):
        start(tmp_path / "run", epochs=4, workers=1)
    assert _load(tmp_path / "run" / "last.pt")["training"]["step"] >= 2


def test_a_full_disk_is_told_by_file_and_the_old_checkpoint_stays(start, tmp_path, monkeypatch, capsys):
    save = torch.save

    def full(content, file):
        if content["epoch"] == 2:
            raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file data/0")
        save(content, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="best.pt: cannot be written: .*failed writing file"):
        start(tmp_path / "run", epochs=3, val_images=None, val_annotations=None)
    assert "what was trained since the last checkpoint is lost: " in capsys.readouterr().err
    assert _load(tmp_path / "run" / "last.pt")["epoch"] == 1
    assert not [entry.name for entry in (tmp_path / "run").iterdir() if entry.name.startswith(".")]


def test_weights_that_were_not_finite_to_begin_with(start, tmp_path):
    start.prepare = lambda model: model.head.weight.data.fill_(math.nan)
    with pytest.raises(NonFiniteLoss, match="that step was skipped, but the model holds numbers that are not finite"):
        start(tmp_path / "run", epochs=1)


def test_data_that_teaches_nothing(start, tmp_path, own_data):
    images, annotations, content = own_data
    options = _without_validation(own_data)
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1
    annotations.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"has no box to train on; it has \d+ annotations"):
        start(tmp_path / "run", **options)
    del content["annotations"]
    annotations.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="has no box to train on; it has 0 annotations"):
        start(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_validation_classes_numbered_differently(start, tmp_path, own_data):
    images, annotations, content = own_data
    first, second = content["categories"][:2]
    first["name"], second["name"] = second["name"], first["name"]
    annotations.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="numbers its categories differently .*3 is 'shape_1', was 'shape_0'"):
        start(tmp_path / "run", val_images=images, val_annotations=annotations)


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


def test_one_image_of_one_cell_is_refused(start, tmp_path):
    start.prepare = lambda model: model.backbone.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8)))
    with pytest.raises(ValueError, match=r"batch_size 1 at image_size \(32, 32\) leaves a BatchNorm a single value"):
        start(tmp_path / "run", batch_size=1, epochs=1)
    assert not (tmp_path / "run").exists()
    assert start(tmp_path / "run", batch_size=1, epochs=1, freeze_bn=True).steps == IMAGES


@pytest.mark.parametrize(
    "size, options, fits",
    [
        (128, {}, False),
        (256, {}, True),
        (256, {"max_level": 8}, False),
        (512, {"max_level": 8}, True),
        (128, {"name": "retinanet_resnet50_fpn"}, True),  # frozen, and no BatchNorm elsewhere
        (128, {"neck": "fpn", "extra_levels": "p5", "head_norm": "group"}, True),
    ],
)
def test_a_batch_of_one_is_refused_where_a_batch_norm_would_see_one_value(size, options, fits):
    with torch.device("meta"):
        model = create_model(**{"name": "efficientdet_lite0", **options}, num_classes=2, image_size=size)
    with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="leaves a BatchNorm a single value"):
        run._check_batch_of_one(model, TrainConfig(batch_size=1))


@pytest.mark.parametrize("broken", ["images", "categories"])
def test_a_file_with_nothing_to_train_on_is_named(start, tmp_path, data, broken):
    content = json.loads(data["train_annotations"].read_text())
    content |= {"annotations": [], broken: []}
    (tmp_path / "empty.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"empty.json.* {broken}"):
        start(tmp_path / "run", train_annotations=tmp_path / "empty.json")
