"""Train, resume, eval and predict through the command line, on generated images with EfficientDet-Lite0."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import effdet_fast
from effdet_fast.cli.main import main
from effdet_fast.export.description import describe
from tests.checks import all_equal
from tests.generated_data import make_dataset
from tests.training.test_distributed import torchrun

ROOT = Path(__file__).parents[2]
RECIPE = "--model efficientdet_lite0 --image-size 64 --batch-size 2 --workers 0 --no-progress --device cpu".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_dataset(folder / "train", images=6, size=(60, 80))
    make_dataset(folder / "val", images=3, size=(60, 80), seed=1)
    return folder


def train_arguments(data, output, *more):
    paths = []
    for share in ("train", "val"):
        paths += [
            f"--{share}-images",
            data / share / "images",
            f"--{share}-annotations",
            data / share / "annotations.json",
        ]
    return ["train", *map(str, paths), "--output", str(output), *RECIPE, *map(str, more)]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run of two epochs, in one go."""
    output = tmp_path_factory.mktemp("runs") / "straight"
    assert main(train_arguments(data, output, "--epochs", 2)) == 0
    return output


def load(path):
    return torch.load(path, weights_only=True)


def assert_same_weights(a, b):
    a, b = load(a), load(b)
    for part in (lambda c: c["state_dict"], lambda c: c["training"]["model"]):
        assert all_equal(part(a), part(b))


def test_a_run_leaves_loadable_weights_and_results(finished):
    best = load(finished / "best.pt")
    assert best["model"] == "efficientdet_lite0" and best["category_ids"] == [3, 7, 40]
    with open(finished / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["3", "6"]
    assert all(float(row["loss"]) > 0 and float(row["AP"]) >= 0 for row in rows)


def test_a_killed_and_resumed_run_gives_the_same_weights(data, finished, tmp_path):
    arguments = train_arguments(data, tmp_path / "run", "--epochs", 2)
    threads = str(torch.get_num_threads())  # sums may be split differently among another number of threads
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": threads}
    process = subprocess.Popen(
        [sys.executable, "-m", "effdet_fast", *arguments, "--workers", "1"],
        start_new_session=True,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "config.json").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, loader workers included
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    last = tmp_path / "run" / "last.pt"
    assert "to continue: effdet-fast train --resume" in output and "Traceback" not in output
    assert 0 < load(last)["training"]["step"] < 6
    assert main(["train", "--resume", str(last)]) == 0
    assert_same_weights(finished / "last.pt", last)


def test_a_model_with_other_options_is_trained_resumed_and_read_back(data, tmp_path):
    options = ["--model-option", "fusion=softmax", "--model-option", "head-repeats=1"]
    assert main(train_arguments(data, tmp_path / "run", "--epochs", 1, *options)) == 0
    assert main(["train", "--resume", str(tmp_path / "run" / "last.pt"), "--epochs", "2"]) == 0
    config = effdet_fast.Detector.from_checkpoint(tmp_path / "run" / "best.pt").model.config
    assert (config.fusion, config.head_repeats, config.fpn_cells) == ("softmax", 1, 3)


def test_a_retinanet_trains_from_scratch_with_batch_norms_that_learn(data, tmp_path):
    arguments = train_arguments(data, tmp_path / "run", "--epochs", 1, "--model", "retinanet_resnet18_fpn")
    assert main([*arguments, "--model-option", "fpn-channels=32"]) == 0
    detector = effdet_fast.Detector.from_checkpoint(tmp_path / "run" / "best.pt")
    config = detector.model.config
    assert effdet_fast.models.model_config(config.name).frozen_batch_norm and not config.frozen_batch_norm
    assert int(detector.model.backbone.bn1.num_batches_tracked) == 3
    found = detector.predict(np.zeros((40, 60, 3), np.uint8), score_threshold=0.0, max_detections=5)
    assert len(found) == 5


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("fusion", "--model-option takes FIELD=VALUE, got 'fusion'"),
        ("fusion=max", "fusion must be one of ['fast', 'softmax', 'sum'], got 'max'"),
        ("necks=fpn", "unknown configuration field(s) ['necks']; known are ['name', 'backbone',"),
    ],
)
def test_a_wrong_model_option_is_named_before_anything_is_written(data, tmp_path, option, message, capsys):
    assert main(train_arguments(data, tmp_path / "run", "--model-option", option)) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_eval_prints_the_runs_own_numbers(data, finished, capsys, tmp_path):
    arguments = ["--images", str(data / "val" / "images"), "--annotations", str(data / "val" / "annotations.json")]
    checkpoint = str(finished / "best.pt")
    command = ["eval", "--checkpoint", checkpoint, *arguments, "--workers", "0", "--no-progress", "--device", "cpu"]
    assert main([*command, "--output", str(tmp_path / "found.json")]) == 0
    printed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    metrics = load(finished / "best.pt")["metrics"]
    assert list(printed) == list(metrics)
    for name, value in metrics.items():
        assert printed[name].startswith("-") if value < 0 else float(printed[name]) == pytest.approx(value, abs=1e-4)
    found = json.loads((tmp_path / "found.json").read_text())
    assert {row["image_id"] for row in found} <= {100, 103, 106} and {row["category_id"] for row in found} <= {3, 7, 40}
    assert main([*command, "--output", str(tmp_path / "found.json")]) == 2  # never replaced unasked


def test_predict_writes_pictures_and_results(data, finished, capsys, tmp_path):
    command = ["predict", "--checkpoint", str(finished / "best.pt"), "--images", str(data / "val" / "images")]
    command += ["--output", str(tmp_path / "out"), "--score-threshold", "0.001", "--no-progress", "--device", "cpu"]
    assert main(command) == 0
    rows = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert f"{len(rows)} detections" in capsys.readouterr().out
    assert rows and {row["category_id"] for row in rows} <= {3, 7, 40}
    pictures = sorted((tmp_path / "out").glob("*.png"))
    assert [Image.open(picture).size for picture in pictures] == [(80, 60)] * 3


def test_mistakes_are_told_before_the_work(data, finished, tmp_path, capsys):
    val, checkpoint = data / "val", ["--checkpoint", finished / "best.pt", "--images", data / "val" / "images"]
    (tmp_path / "file").write_text("")
    evaluate, predict = ["eval", *checkpoint, "--annotations", val / "annotations.json"], ["predict", *checkpoint]
    cases = [
        ([*evaluate, "--score-threshold", "30"], "error: score_threshold must be in [0, 1], got 30.0"),
        (
            [*predict, "--output", tmp_path / "out", "--score-threshold", "30"],
            "score_threshold must be in [0, 1], got 30.0",
        ),
        ([*evaluate, "--output", tmp_path / "file" / "found.json"], "file: cannot be written to: "),
        ([*predict, "--output", tmp_path / "file" / "out"], "cannot be written to: "),
        ([*predict, "--output", val / "images", "--no-draw"], "lies inside the images folder"),
        ([*predict, "--output", val / "images" / "found"], "lies inside the images folder"),
    ]
    for arguments, message in cases:
        assert main([*map(str, arguments), "--device", "cpu"]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1, error
    assert not (val / "images" / "found").exists() and not (tmp_path / "out").exists()


def test_results_have_the_image_ids_of_the_file(data, finished, tmp_path):
    content = json.loads((data / "val" / "annotations.json").read_text())
    for row in (*content["images"], *content["annotations"]):
        key = "image_id" if "image_id" in row else "id"
        row[key] = f"{row[key]:06d}_d"
    (tmp_path / "strings.json").write_text(json.dumps(content))
    options = {"annotations": tmp_path / "strings.json", "workers": 1, "device": "cpu", "score_threshold": 0.001}
    images = data / "val" / "images"
    effdet_fast.evaluate(finished / "best.pt", images, **options, output=tmp_path / "found.json")
    found = effdet_fast.predict(finished / "best.pt", images, tmp_path / "out", **options, draw=False)
    ids = {row["id"] for row in content["images"]}
    for rows in (found, json.loads((tmp_path / "found.json").read_text())):
        assert rows and {row["image_id"] for row in rows} <= ids


def test_one_depth_from_training_to_prediction(tmp_path, capsys):
    images, annotations = make_dataset(tmp_path / "data", images=3, size=(60, 80))
    for path in images.iterdir():
        Image.fromarray(np.asarray(Image.open(path).convert("L")).astype(np.uint16) * 4).save(path)
    options = {
        "train_images": images,
        "train_annotations": annotations,
        "model": "efficientdet_lite0",
        "image_size": 64,
    }
    options |= {"batch_size": 3, "workers": 0, "device": "cpu"}
    result = effdet_fast.train(**options, epochs=1, output=tmp_path / "run")
    assert "taken as 10 bits (see --depth)" in capsys.readouterr().out
    assert load(result.best)["preprocessing"]["depth"] == 10
    detector = effdet_fast.Detector.from_checkpoint(result.best, device="cpu")
    bright = Image.fromarray(np.full((64, 64), 800, np.uint16))
    bright.save(tmp_path / "a.png")
    for picture in (bright, tmp_path / "a.png"):
        assert detector.prepare(picture)[0][0, 0, 0] == 800 >> 2
    assert "10 bits" in describe(detector, None)["depth"]
    with pytest.warns(UserWarning, match="1 -> 2 epochs"):
        again = effdet_fast.train(resume=result.last, epochs=2, progress=False)
    assert load(again.last)["preprocessing"]["depth"] == load(again.last)["training"]["config"]["depth"] == 10
    with pytest.raises(ValueError, match="a resumed run cannot change depth"):
        effdet_fast.train(resume=result.last, epochs=3, depth=12)


def test_the_python_functions_are_the_same(data, finished, tmp_path):
    val = data / "val"
    metrics = effdet_fast.evaluate(
        finished / "best.pt", val / "images", val / "annotations.json", workers=0, device="cpu"
    )
    assert metrics == pytest.approx(load(finished / "best.pt")["metrics"], abs=1e-6)
    detector = effdet_fast.Detector.from_checkpoint(finished / "best.pt", device="cpu")
    picture = val / "images" / "picture_000.png"
    found = detector.predict(picture, score_threshold=0.001)
    rows = effdet_fast.predict(detector, picture, tmp_path / "out", score_threshold=0.001)
    assert len(rows) == len(found.boxes) > 0


def test_fine_tuning_to_other_classes_keeps_all_but_the_class_layer(data, finished, tmp_path, capsys):
    images, annotations = make_dataset(tmp_path / "other", images=2, size=(60, 80), classes=2)
    options = {
        "train_images": images,
        "train_annotations": annotations,
        "image_size": 64,
        "batch_size": 2,
        "workers": 0,
    }
    options |= {"model": "efficientdet_lite0", "epochs": 1, "device": "cpu", "progress": False, "lr": 1e-12}
    result = effdet_fast.train(checkpoint=finished / "best.pt", output=tmp_path / "run", ema_decay=0.0, **options)
    assert "the class layer starts anew" in capsys.readouterr().out
    before, after = load(finished / "best.pt")["state_dict"], load(result.last)["state_dict"]
    weight = "class_net.predict.conv_pw.weight"
    assert after[weight].shape[0] == 18 and before[weight].shape[0] == 27
    for name in ("backbone.conv_stem.weight", "box_net.predict.conv_pw.weight"):
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-6)


def test_a_picture_that_breaks_on_decoding_is_one_line(data, tmp_path, capsys):
    make_dataset(tmp_path / "train", images=4, size=(60, 80), suffix=".jpg")
    for picture in (tmp_path / "train" / "images").iterdir():
        picture.write_bytes(picture.read_bytes()[:-600])
    (tmp_path / "val").symlink_to(data / "val")
    arguments = train_arguments(tmp_path, tmp_path / "run", "--epochs", 1, "--workers", 1)
    assert main(arguments) == 2
    saved, error = capsys.readouterr().err.strip().splitlines()
    assert saved.startswith("stopped by an error after 0 steps; to continue: effdet-fast train --resume")
    assert error.startswith("effdet-fast train: error: ") and "picture_00" in error and ".jpg" in error


def test_two_processes_train_and_evaluate_together(data, tmp_path, capsys):
    arguments = train_arguments(data, tmp_path / "run", "--epochs", 1)
    done = torchrun("-m", "effdet_fast", *arguments)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("finished 1 epochs") == 1
    last = load(tmp_path / "run" / "last.pt")
    assert last["training"]["images_per_step"] == 4 and last["training"]["step"] == 2
    assert len(last["metrics"]) == 12
    assert main(arguments) == 2
    assert "already holds a run" in capsys.readouterr().err
