"""Detector and predict: pictures in, boxes in their pixels out; nobody's files are overwritten."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import nn

from effdet_fast.data import CocoDetection
from effdet_fast.detector import Detector
from effdet_fast.drawing import class_color, draw_boxes
from effdet_fast.evaluation import evaluate
from effdet_fast.evaluation.trained_model import TrainedModel, load_trained_model
from effdet_fast.models import create_model, model_config
from effdet_fast.ops import Detections
from effdet_fast.prediction import predict
from tests.generated_data import make_dataset


class WhiteFinder(nn.Module):
    """Finds the one white rectangle of each image, as class 1, with a score of 0.8 and a worse copy of 0.2."""

    def forward(self, images):
        return images, []

    def detect(self, outputs, *, score_threshold=None, iou_threshold=0.5, max_detections=100, clip_sizes=None):
        images = outputs[0]
        boxes, scores = torch.zeros(len(images), 2, 4), torch.tensor([[0.8, 0.2]]).repeat(len(images), 1)
        counts = torch.zeros(len(images), dtype=torch.int64)
        for i, image in enumerate(images):
            ys, xs = torch.nonzero(image.amin(0) > 0.5, as_tuple=True)
            if len(ys):
                boxes[i] = torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()
                counts[i] = 1 if score_threshold is not None and score_threshold > 0.2 else 2
        labels = torch.ones(scores.shape, dtype=torch.int64)
        return Detections(boxes, scores, labels, labels, counts)


@pytest.fixture
def finder():
    half = (0.5, 0.5, 0.5)
    device = torch.device("cpu")
    return Detector(TrainedModel(WhiteFinder(), ["cat", "dog"], [4, 90], half, half, (96, 128), device))


def picture(size=(150, 300), box=(40, 30, 200, 120)):
    image = Image.new("RGB", (size[1], size[0]), (20, 20, 20))
    ImageDraw.Draw(image).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=(255, 255, 255))
    return image


def test_boxes_are_in_original_pixels(finder, tmp_path):
    picture().save(tmp_path / "a.png")
    for image in (
        str(tmp_path / "a.png"),
        tmp_path / "a.png",
        picture(),
        np.asarray(picture()),
        picture().convert("L"),
    ):
        found = finder.predict(image)
        assert len(found) == 1 and found.size == (150, 300)
        np.testing.assert_allclose(found.boxes, [[40, 30, 200, 120]], atol=3)
        assert found.labels.tolist() == [1] and found.category_ids.tolist() == [90] and found.class_names == ["dog"]
        assert found.boxes.dtype == np.float32 and found.scores.tolist() == [pytest.approx(0.8)]
    (row,) = found.to_coco(7)
    assert row["image_id"] == 7 and row["category_id"] == 90
    np.testing.assert_allclose(row["bbox"], [40, 30, 160, 90], atol=3)
    assert len(finder.predict(picture(), score_threshold=None)) == 2
    assert json.dumps(found.to_coco(np.int64(7))) == json.dumps([row])


def test_lists_of_different_pictures(finder):
    images = [
        picture(),
        picture((60, 50), (10, 20, 30, 50)),
        Image.new("RGB", (10, 10)),
        np.zeros((4, 900, 3), np.uint8),
    ]
    found = finder.predict(images, batch_size=3)
    assert [len(f) for f in found] == [1, 1, 0, 0] and [f.size for f in found] == [
        (150, 300),
        (60, 50),
        (10, 10),
        (4, 900),
    ]
    np.testing.assert_allclose(found[1].boxes, [[10, 20, 30, 50]], atol=2)
    assert finder.predict([]) == [] and found[2].boxes.shape == (0, 4)
    assert [len(f) for f in finder.predict((images[0],))] == [1]


def test_bad_arguments(finder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        finder.predict(tmp_path / "none.png")
    with pytest.raises(TypeError, match="got int"):
        finder.predict(3)
    with pytest.raises(TypeError, match="uint8, got float64"):
        finder.predict([np.zeros((4, 4, 3))])
    for options in ({"batch_size": 0}, {"max_detections": 0}, {"score_threshold": 30}, {"iou_threshold": -0.1}):
        (name,) = options
        with pytest.raises(ValueError, match=f"predict: {name} must be"):
            finder.predict(picture(), **options)
    with pytest.raises(TypeError, match="predict: score_threshold must be a number, got str"):
        finder.predict(picture(), score_threshold="0.3")


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "in"
    images.mkdir()
    picture().save(images / "b.jpg", quality=95)
    picture().convert("RGBA").save(images / "c.png")
    picture().convert("CMYK").save(images / "d.tif")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture().transpose(Image.Transpose.ROTATE_90).save(images / "a.jpg", exif=exif, quality=95)
    (images / "notes.txt").write_text("not a picture")
    return images


def test_predict_writes_pictures_and_results(finder, folder, tmp_path):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    out = tmp_path / "deep" / "out"
    rows = predict(finder, folder, out, batch_size=3)
    assert sorted(p.name for p in out.iterdir()) == ["a.jpg", "b.jpg", "c.png", "d.tif.png", "detections.json"]
    assert json.loads((out / "detections.json").read_text()) == rows
    assert [(r["image_id"], r["file_name"]) for r in rows] == [(1, "a.jpg"), (2, "b.jpg"), (3, "c.png"), (4, "d.tif")]
    for row in rows:
        np.testing.assert_allclose(row["bbox"], [40, 30, 160, 90], atol=3)
        assert row["category_id"] == 90
    for name in ("a.jpg", "d.tif.png"):
        drawn = Image.open(out / name)
        assert drawn.size == (300, 150) and drawn.getexif().get(0x0112, 1) == 1
        line = np.asarray(drawn.convert("RGB"))[60:110, 36:45].astype(int)
        assert np.abs(line - class_color(1)).sum(axis=2).min(axis=1).max() < 80
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_predict_never_replaces_unasked(finder, folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "c.png").write_text("mine")
    with pytest.raises(FileExistsError, match=r"c\.png: exists"):
        predict(finder, folder, out)
    assert [p.name for p in out.iterdir()] == ["c.png"] and (out / "c.png").read_text() == "mine"
    predict(finder, folder, out, overwrite=True)
    assert Image.open(out / "c.png").size == (300, 150)
    with pytest.raises(FileExistsError, match=r"detections\.json: exists"):
        predict(finder, folder, out, draw=False)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(FileExistsError, match="will not be replaced"):
        predict(finder, folder, folder, overwrite=True)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    (out / "detections.json").unlink()
    (out / "detections.json").mkdir()
    with pytest.raises(FileExistsError, match=r"detections\.json: is a folder"):
        predict(finder, folder, out, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file, the output must be a folder"):
        predict(finder, folder, tmp_path / "file")


def test_predict_without_drawing_and_of_one_file(finder, folder, tmp_path):
    shutil.copy(folder / "c.png", folder / "000042.png")
    rows = predict(finder, folder / "000042.png", tmp_path / "out", draw=False)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["detections.json"]
    assert [r["image_id"] for r in rows] == [42] and "file_name" not in rows[0]


def test_predict_with_annotations(finder, folder, tmp_path):
    (folder / "sub").mkdir()
    (folder / "b.jpg").rename(folder / "sub" / "b.jpg")
    file = tmp_path / "a.json"
    content = {"images": [{"id": 9, "file_name": "sub/b.jpg"}, {"id": 5, "file_name": "a.jpg"}], "categories": []}
    file.write_text(json.dumps(content))
    rows = predict(finder, folder, tmp_path / "out", annotations=file)
    assert [r["image_id"] for r in rows] == [9, 5] and (tmp_path / "out" / "sub" / "b.jpg").is_file()
    # Annotated on the stored, lying pixels: so the boxes are, too.
    content["images"] = [{"id": 5, "file_name": "a.jpg", "width": 150, "height": 300}]
    file.write_text(json.dumps(content))
    (row,) = predict(finder, folder, tmp_path / "lying", annotations=file)
    np.testing.assert_allclose(row["bbox"], [30, 100, 90, 160], atol=3)
    assert Image.open(tmp_path / "lying" / "a.jpg").size == (150, 300)
    for name in ("../a.jpg", "/etc/a.jpg", "sub/../../a.jpg"):
        content["images"] = [{"id": 5, "file_name": name}]
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="is absolute or leads out of the images folder"):
            predict(finder, folder, tmp_path / "out2", annotations=file)
    with pytest.raises(ValueError, match="images must be the folder"):
        predict(finder, folder / "a.jpg", tmp_path / "out2", annotations=file)


def test_predict_follows_no_link_inside_its_output(finder, folder, tmp_path):
    (folder / "sub").mkdir()
    (folder / "b.jpg").rename(folder / "sub" / "b.jpg")
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"images": [{"id": 9, "file_name": "sub/b.jpg"}], "categories": []}))
    for place in ("elsewhere", "out"):
        (tmp_path / place).mkdir()
    (tmp_path / "out" / "sub").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="sub: is a link inside the output folder"):
        predict(finder, folder, tmp_path / "out", annotations=file, overwrite=True)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_predict_names_broken_pictures(finder, folder, tmp_path):
    (folder / "broken.jpg").write_bytes(b"no")
    with pytest.warns(UserWarning, match=r"(?s)1 of 5 pictures were left out:.*broken\.jpg: cannot be decoded"):
        rows = predict(finder, folder, tmp_path / "out", batch_size=2)
    assert len(rows) == 4
    with pytest.raises(ValueError, match=r"(?s)no picture could be used:.*broken\.jpg"):
        predict(finder, folder / "broken.jpg", tmp_path / "out2")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: holds no pictures"):
        predict(finder, tmp_path / "empty", tmp_path / "out3")
    with pytest.raises(FileNotFoundError, match="nowhere: no such picture or folder"):
        predict(finder, tmp_path / "nowhere", tmp_path / "out3")
    with pytest.raises(ValueError, match="workers and batch_size"):
        predict(finder, folder, tmp_path / "out3", workers=0)


def save_checkpoint(path, **changes):
    torch.manual_seed(0)
    model = create_model("efficientdet_lite0", num_classes=3, image_size=(64, 128))
    content = {
        "format": 1,
        "model": "efficientdet_lite0",
        "config": dataclasses.asdict(model.config),
        "class_names": ["shape_0", "shape_1", "shape_2"],
        "category_ids": [3, 7, 40],
        "preprocessing": {"mean": model.config.mean, "std": model.config.std, "image_size": (64, 128)},
        "state_dict": model.state_dict(),
        **changes,
    }
    torch.save({key: value for key, value in content.items() if value is not None}, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "best.pt")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"), images=5, size=(90, 140), suffix=".jpg")


def test_evaluate_and_detector_agree_on_a_real_model(checkpoint, data, tmp_path):
    output = tmp_path / "new" / "detections.json"
    options = {"batch_size": 2, "workers": 0, "device": "cpu"}
    metrics = evaluate(checkpoint, *data, **options, output=output, max_detections=20)
    assert len(metrics) == 16 and 0 <= metrics["AP"] < 0.9
    rows = json.loads(output.read_text())
    dataset = CocoDetection(*data)
    assert {r["image_id"] for r in rows} == set(dataset.image_ids) and {r["category_id"] for r in rows} <= {3, 7, 40}
    detector = Detector.from_checkpoint(checkpoint, device="cpu")
    paths = [dataset.path(i) for i in range(len(dataset))]
    found = detector.predict(paths, score_threshold=None, max_detections=20, batch_size=2)
    again = [row for f, i in zip(found, dataset.image_ids, strict=True) for row in f.to_coco(i)]
    assert len(again) == len(rows) == 100
    for a, b in zip(rows, again, strict=True):
        assert a["image_id"] == b["image_id"] and a["category_id"] == b["category_id"]
        assert a["score"] == pytest.approx(b["score"], abs=1e-6)
        np.testing.assert_allclose(a["bbox"], b["bbox"], atol=1e-3)
        x, y, w, h = a["bbox"]
        assert x >= 0 and y >= 0 and x + w <= 140.001 and y + h <= 90.001
    with pytest.raises(FileExistsError, match=r"detections\.json: exists"):
        evaluate(checkpoint, *data, **options, output=output)
    assert len(evaluate(checkpoint, *data, **options, image_size=64, amp="bf16")) == 12


def test_evaluate_compares_categories(checkpoint, data, tmp_path):
    content = json.loads(data[1].read_text())
    other = tmp_path / "other.json"
    content["categories"][1]["name"] = "tree"
    other.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="names its categories differently .*7 is 'tree', was 'shape_1'"):
        evaluate(checkpoint, data[0], other, workers=0, device="cpu")
    content["categories"].append({"id": 8, "name": "new"})
    content["annotations"][0]["category_id"] = 8
    other.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"annotation id 1 .*category 8 \('new'\).*not among the model's ids"):
        evaluate(checkpoint, data[0], other, workers=0, device="cpu")


def test_loaded_model_is_ready_and_other_files_are_refused(checkpoint, tmp_path):
    trained = load_trained_model(checkpoint, "cpu")
    assert not trained.model.training and trained.image_size == (64, 128) and trained.category_ids == [3, 7, 40]
    assert not any(p.requires_grad for p in trained.model.parameters())
    with pytest.raises(FileNotFoundError, match="none.pt: no such checkpoint"):
        Detector.from_checkpoint(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match="text.pt: cannot be read as a checkpoint"):
        Detector.from_checkpoint(tmp_path / "text.pt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="it has no format, model, config"):
        Detector.from_checkpoint(tmp_path / "weights.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="is not a checkpoint of a trained detector"):
        Detector.from_checkpoint(tmp_path / "list.pt")


SMALL = dataclasses.asdict(model_config("efficientdet_lite0", num_classes=3, image_size=64))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": 2}, "has checkpoint format 2"),
        ({"format": None}, "is not a checkpoint of a trained detector, it has no format;"),
        ({"format": "1"}, "has checkpoint format 1;"),
        ({"class_names": ["a"]}, "has 3 classes, 1 class names and 3 category ids"),
        ({"category_ids": [3, 3, 4]}, "3 class names and 2 category ids"),
        ({"config": {"name": "efficientdet_lite0", "nonsense": 3}}, "holds no usable model configuration"),
        ({"preprocessing": {"image_size": 64}}, "its preprocessing has no mean, std"),
        ({"state_dict": {"a": torch.zeros(1)}}, "does not fit"),
        ({"state_dict": "/dev/zero"}, "its state_dict must be a mapping, got a str"),
        ({"preprocessing": [64]}, "its preprocessing must be a dict, got a list"),
        ({"preprocessing": {"mean": [0.5], "std": [1, 1, 1], "image_size": 64}}, "mean must have 3 values"),
        ({"category_ids": [[], 1, 2]}, "holds no usable model configuration"),
        ({"config": {**SMALL, "fpn_cells": 10**9}}, "fpn_cells must be an integer in"),
        ({"config": {**SMALL, "head_repeats": 10**5}}, "head_repeats must be an integer in"),
        ({"config": {**SMALL, "max_level": 10**6}}, "max_level in"),
    ],
)
def test_contradictory_checkpoints_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        Detector.from_checkpoint(save_checkpoint(tmp_path / "bad.pt", **changes), "cpu")


def test_drawing():
    image = np.zeros((60, 80, 3), dtype=np.uint8)
    red, green = (255, 0, 0), (0, 255, 0)
    drawn = np.asarray(draw_boxes(image, [[10, 30, 40, 50], [-9, 5, 500, 20]], ["thing 0.93", "ü 中"], [red, green]))
    assert drawn[40, 10].tolist() == [255, 0, 0] and drawn[30, 35].tolist() == [255, 0, 0]
    assert drawn[40, 25].tolist() == [0, 0, 0] and image.max() == 0
    assert (drawn[20, 70:79] == [0, 255, 0]).all()
    assert (drawn[18:30, 10:40] == [255, 0, 0]).all(axis=2).sum() > 100, "a plate above the box"
    assert np.asarray(draw_boxes(image, np.zeros((0, 4)))).max() == 0
    draw_boxes(Image.new("L", (3, 2)), [[0, 0, 3, 2], [5, 5, 1, 1]], ["a long label", ""])
    assert len({class_color(i) for i in range(90)}) == 90
    with pytest.raises(ValueError, match="1 boxes need as many texts, got 2"):
        draw_boxes(image, [[0, 0, 1, 1]], ["a", "b"])
