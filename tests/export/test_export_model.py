"""Exported files: onnxruntime's and torch.export's results are ours, and the files say what they are."""

import importlib.util
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from effdet_fast import Detector, export_model
from effdet_fast.cli.main import main
from tests.checks import all_equal
from tests.export.exported import (
    CATEGORY_IDS,
    CLASS_NAMES,
    TINY,
    anchor_sides,
    as_detector,
    assert_same,
    every_anchor,
    exact_anchors,
    lively_model,
    predicted,
    run_of,
    save_checkpoint,
    three_pictures,
)

SIZE = (64, 96)
ROWS = 10


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    return save_checkpoint(lively_model("efficientdet_d0", SIZE, **TINY), tmp_path_factory.mktemp("run") / "best.pt")


@pytest.fixture(scope="module")
def detector(checkpoint):
    return Detector.from_checkpoint(checkpoint, "cpu")


@pytest.fixture(scope="module")
def images_and_threshold(detector):
    torch.manual_seed(1)
    return three_pictures(detector, ROWS)


@pytest.fixture(scope="module", params=["file.onnx", "file.pt2"])
def end_to_end(request, checkpoint, images_and_threshold, tmp_path_factory):
    path = tmp_path_factory.mktemp("end_to_end") / request.param
    options = {"score_threshold": images_and_threshold[1], "iou_threshold": 0.4, "max_detections": ROWS}
    return path, export_model(checkpoint, path, end_to_end=True, **options), options


def description_in(path):
    if path.suffix == ".onnx":
        texts = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
        plain = ("producer", "model", "input", "preprocessing")
        return {key: text if key in plain else json.loads(text) for key, text in texts.items()}
    files = {"metadata.json": ""}
    torch.export.load(path, extra_files=files)
    return json.loads(files["metadata.json"])


def assert_standard(path):
    """No operator, function or path of this package is in the file."""
    if path.suffix == ".onnx":
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
        assert not model.functions and {node.domain for node in model.graph.node} == {""}
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
        content = path.read_bytes()
    else:
        program = torch.export.load(path)
        nodes = [node for module in program.graph_module.modules() for node in module.graph.nodes]
        targets = {node.target for node in nodes if node.op == "call_function"}
        namespaces = {target.namespace for target in targets if hasattr(target, "namespace")}
        assert namespaces <= {"aten", "higher_order"} and len(targets) > 20
        with zipfile.ZipFile(path) as archive:
            content = b"".join(archive.read(name) for name in archive.namelist())
    assert str(Path(__file__).parents[2]).encode() not in content and b"effdet_fast::" not in content


def test_detections_are_those_of_predict_for_any_batch(end_to_end, detector, images_and_threshold):
    path, _, options = end_to_end
    images, run = images_and_threshold[0], run_of(path)
    expected = predicted(detector, images, **options)
    assert expected["counts"][2] == 0 < expected["counts"][1] < expected["counts"][0]
    for batch in (3, 1, 2):
        rows = slice(3 - batch, 3)
        assert_same(run(images[rows]), {name: values[rows] for name, values in expected.items()}, max(SIZE))


def test_an_end_to_end_file_says_what_it_is(end_to_end, checkpoint):
    path, returned, options = end_to_end
    description = description_in(path)
    assert {"path": str(path), **description} == returned
    assert description["class_names"] == CLASS_NAMES and description["category_ids"] == CATEGORY_IDS
    assert description["image_size"] == list(SIZE) and description["model"] == "efficientdet_d0"
    preprocessing = torch.load(checkpoint, weights_only=True)["preprocessing"]
    assert [tuple(description[key]) for key in ("mean", "std")] == [preprocessing["mean"], preprocessing["std"]]
    assert "uint8 [batch, 3, 64, 96], RGB" in description["input"] and "top left" in description["preprocessing"]
    assert list(description["outputs"]) == ["boxes", "scores", "labels", "counts"]
    assert "[batch, 10, 4]" in description["outputs"]["boxes"]
    assert description["end_to_end"] is True and options.items() <= description.items()
    assert_standard(path)


@pytest.mark.parametrize("end_to_end", ["file.onnx"], indirect=True)
def test_onnx_names_its_shapes(end_to_end):
    path, description, _ = end_to_end
    graph = onnx.load(path).graph
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes == {
        "images": ["batch", 3, *SIZE],
        "boxes": ["batch", 10, 4],
        "scores": ["batch", 10],
        "labels": ["batch", 10],
        "counts": ["batch"],
    }
    assert [value.doc_string for value in graph.output] == list(description["outputs"].values())


@pytest.mark.parametrize("name", ["all.onnx", pytest.param("all.pt2", marks=pytest.mark.slow)])
def test_all_anchors_have_the_boxes_and_scores_that_predict_starts_from(name, detector, images_and_threshold, tmp_path):
    path, images = tmp_path / "new" / name, images_and_threshold[0]
    before = {name: value.clone() for name, value in detector.model.state_dict().items()}
    modules = {name: type(module) for name, module in detector.model.named_modules()}
    description = export_model(detector, path)
    assert [entry.name for entry in path.parent.iterdir()] == [name]
    assert {name: type(module) for name, module in detector.model.named_modules()} == modules
    assert all_equal(detector.model.state_dict(), before)

    assert description == {"path": str(path), **description_in(path)} and "score_threshold" not in description
    assert list(description["outputs"]) == ["boxes", "scores"]
    assert_standard(path)
    expected, run = every_anchor(detector, images), run_of(path)
    for batch in (3, 1):
        rows = {name: values[:batch] for name, values in expected.items()}
        assert_same(run(images[:batch]), rows, anchor_sides(detector))


def test_pictures_go_through_as_predict_takes_them(end_to_end, detector, images_and_threshold):
    """What the description says about preprocessing is all it takes."""
    path, description, options = end_to_end
    # Of the input's form, so that nothing is filled.
    picture = Image.fromarray(images_and_threshold[0][0].permute(1, 2, 0).numpy()).resize((72, 48))
    height, width = description["image_size"]
    pixels = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    got = run_of(path)(torch.from_numpy(pixels.copy())[None])
    found = detector.predict(picture, **options)
    assert 0 < len(found) == got["counts"][0]
    expected = {"boxes": found.boxes * 64 / 48, "scores": found.scores, "labels": found.labels}
    assert_same({name: got[name][0, : len(found)] for name in expected}, expected, max(SIZE))
    assert [description["class_names"][label] for label in found.labels] == found.class_names


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("model.bin", {}, r"format must be given unless output ends in \.onnx or \.pt2, got '.*model\.bin'"),
        ("model.onnx", {"format": "tflite"}, r"format must be one of \['onnx', 'torch_export'\], got 'tflite'"),
        ("model.pt2", {"score_threshold": 0.3}, "score_threshold, iou_threshold and max_detections go with end_to_end"),
        ("model.pt2", {"end_to_end": True, "score_threshold": 1.5}, r"score_threshold must be in \[0, 1\], got 1\.5"),
        ("model.pt2", {"end_to_end": True, "iou_threshold": -0.1}, r"iou_threshold must be in \[0, 1\], got -0\.1"),
        ("model.pt2", {"end_to_end": True, "max_detections": 0}, "max_detections must be >= 1, got 0"),
        ("model.pt2", {"image_size": 64}, "image_size goes with a checkpoint file"),
    ],
)
def test_bad_arguments_leave_nothing_behind(detector, tmp_path, name, options, message):
    with pytest.raises(ValueError, match=message):
        export_model(detector, tmp_path / name, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", [{}, {"format": "onnx"}])
def test_a_file_without_a_name_needs_a_checkpoint_file_and_a_format(detector, checkpoint, given):
    with pytest.raises(ValueError, match="output must be given unless there are a checkpoint file and a format"):
        export_model(detector if given else checkpoint, **given)


def test_without_the_onnx_packages_one_line_names_the_extra(checkpoint, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    assert main(["export", str(checkpoint), str(tmp_path / "model.onnx")]) == 2
    assert capsys.readouterr().err == "effdet-fast export: error: format onnx needs `pip install effdet_fast[onnx]`\n"


def test_the_command_replaces_nothing_unasked(checkpoint, tmp_path, capsys):
    shutil.copy(checkpoint, tmp_path / "program.pt")
    output = tmp_path / "program.pt2"
    output.write_text("mine")
    arguments = ["export", str(tmp_path / "program.pt"), "--format", "torch_export", "--end-to-end"]
    assert main(arguments) == 2
    assert "program.pt2: exists; pass overwrite to replace it" in capsys.readouterr().err
    assert output.read_text() == "mine"
    assert main([*arguments, "--image-size", "64", "--max-detections", "7", "--overwrite"]) == 0
    said, warned = capsys.readouterr()
    assert "efficientdet_d0, 5 classes" in said and "uint8 [batch, 3, 64, 64]" in said and "[batch, 7, 4]" in said
    assert not warned
    detector = Detector.from_checkpoint(checkpoint, "cpu", image_size=64)
    images = three_pictures(detector, 7)[0]
    assert_same(run_of(output)(images), predicted(detector, images, max_detections=7), 64)
    assert main(["export", str(tmp_path / "none.pt"), str(tmp_path / "a.pt2")]) == 2
    assert "none.pt: no such checkpoint" in capsys.readouterr().err


SLOW = {
    "efficientdet_lite0": ("efficientdet_lite0", (64, 64), {}),
    "efficientdet_d0": ("efficientdet_d0", (128, 128), {}),
    "odd_sizes_symmetric": ("efficientdet_d0_symmetric", (72, 100), {"fusion": "softmax"}),
    "retinanet": ("retinanet_resnet18_fpn", (64, 96), {}),
    "retinanet_v2": ("retinanet_resnet18_fpn_v2", (64, 64), {}),
    "nas_fpn": ("efficientdet_d0", (64, 64), {"neck": "nas_fpn", "fusion": "softmax", "head": "conv"}),
    "panet": ("retinanet_resnet18_fpn", (64, 64), {"neck": "panet", "fusion": "fast", "extra_levels": "pool"}),
    "timm": ("efficientdet_d0", (64, 64), {"backbone": "timm:mobilenetv3_small_050"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("end_to_end", [False, True])
@pytest.mark.parametrize("name", ["model.onnx", "model.pt2"])
@pytest.mark.parametrize("case", SLOW)
def test_every_kind_of_model(case, name, end_to_end, tmp_path):
    model, size, options = SLOW[case]
    detector = as_detector(lively_model(model, size, **options))
    images, _ = three_pictures(detector, ROWS)
    rows = {"max_detections": ROWS} if end_to_end else {}
    export_model(detector, tmp_path / name, end_to_end=end_to_end, **rows)
    assert_standard(tmp_path / name)
    if end_to_end:
        expected, unit, tolerance = predicted(detector, images, **rows), max(size), 1e-4
    else:
        expected, error = exact_anchors(detector, images)
        # From float64 1e-4, or twice as far as ours where float32 itself is that far: the file's error is another draw of that.
        unit, tolerance = anchor_sides(detector), max(1e-4, 2 * error)
    run = run_of(tmp_path / name)
    for batch in (1, 3):
        assert_same(run(images[:batch]), {name: values[:batch] for name, values in expected.items()}, unit, tolerance)
