"""What ends a run, what is kept of it, and what a run refuses to start with."""

import contextlib
import json
import math
import multiprocessing
import os
import signal
import zlib

import pytest
import torch
from torch import nn

from effdet_fast.data.loader import LoaderProcessLost
from effdet_fast.models import create_model
from effdet_fast.training import NonFiniteLoss, TrainConfig, run
from tests.training.conftest import IMAGES, STEPS
from tests.training.test_trainer import _load, _same


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
    content["images"].reverse()
    annotations.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=f"{IMAGES} in another place of the file; the epoch under way starts again"):
        start(tmp_path / "moved", resume=stopped.last, epochs=2)
    content["images"].reverse()
    content["categories"][0]["name"] = "another"
    annotations.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="trained on other classes .*3: 'shape_0'.* than .*3: 'another'"):
        start(tmp_path / "longest", resume=stopped.last, epochs=2)


def test_another_data_set_with_the_same_image_ids_is_refused(start, tmp_path, own_data):
    images, annotations, content = own_data
    stopped = start(tmp_path / "run", epochs=1, **_without_validation(own_data))
    for row in content["annotations"]:
        row["bbox"][0] += 1
    for image in content["images"]:
        (images / image["file_name"]).rename(images / f"other_{image['file_name']}")
        image["file_name"] = f"other_{image['file_name']}"
    annotations.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="was trained on other data: of its 10 images .* has 1"):  # that without boxes
        start(tmp_path / "longer", resume=stopped.last, epochs=2)


def test_a_resumed_run_keeps_its_classes(start, tmp_path, own_data):
    """Also one that a new run would leave out."""
    _, annotations, content = own_data
    for row in content["categories"]:
        row["id"] += 1
    for row in content["annotations"]:
        row["category_id"] += 1
    content["categories"].append({"id": 0, "name": "shapes"})
    annotations.write_text(json.dumps(content))
    stopped = start(tmp_path / "run", epochs=1, **_without_validation(own_data))
    for row in content["categories"][:-1]:
        row["supercategory"] = "shapes"
    annotations.write_text(json.dumps(content))
    longer = start(tmp_path / "longer", resume=stopped.last, epochs=2)
    assert _load(longer.last)["category_ids"] == _load(stopped.last)["category_ids"] == [0, 4, 8, 41]


def _own_children(others):
    """Not those of other tests, whose loaders wait to be collected and would raise in the middle of this one."""
    return set(multiprocessing.active_children()).difference(others)


def test_a_signal_that_ends_the_loader_processes_too_is_a_signal(start, tmp_path):
    others = multiprocessing.active_children()

    def prepare(model):
        def terminate(call):
            if call == 1:
                os.kill(os.getpid(), signal.SIGTERM)
                for child in _own_children(others):
                    child.terminate()
                    child.join()

        model.on_loss = terminate

    start.prepare = prepare
    result = start(tmp_path / "run", epochs=4, workers=1)
    assert result.signal == signal.SIGTERM and _load(result.last)["training"]["step"] == result.steps


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
    others = multiprocessing.active_children()

    def prepare(model):
        def kill(call):
            if call == 1:
                for child in _own_children(others):
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
