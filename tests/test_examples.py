"""The pieces of the tree example that need no download."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from effdet_fast.data import CocoDetection

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import focal_loss
import necks
import neon_data
import neon_trees


@pytest.fixture
def photograph():
    return Image.fromarray(np.arange(70 * 100 * 3, dtype=np.uint32).astype(np.uint8).reshape(70, 100, 3))


def test_tiles_cover_the_photograph_and_boxes_are_cut(tmp_path, photograph):
    boxes = np.array([[5.0, 5, 15, 15], [36, 10, 46, 20], [38, 60, 48, 70]])
    file = neon_data.cut_tiles(photograph, boxes, side=40, stride=40, folder=tmp_path / "val")
    content = json.loads(file.read_text())
    sizes = {image["file_name"]: (image["width"], image["height"]) for image in content["images"]}
    assert sizes["00000_00000.png"] == (40, 40) and sizes["00080_00040.png"] == (20, 30) and len(sizes) == 6
    pieces = np.array(photograph)
    for name in sizes:
        left, top = int(name[:5]), int(name[6:11])
        tile = np.array(Image.open(tmp_path / "val" / name))
        assert (tile == pieces[top : top + 40, left : left + 40]).all()
    names = {image["id"]: image["file_name"] for image in content["images"]}
    found = {(names[a["image_id"]], *a["bbox"]): a["iscrowd"] for a in content["annotations"]}
    assert found == {
        ("00000_00000.png", 5, 5, 10, 10): 0,
        ("00000_00000.png", 36, 10, 4, 10): 1,  # less than half of it is in this tile
        ("00040_00000.png", 0, 10, 6, 10): 0,
        ("00000_00040.png", 38, 20, 2, 10): 1,
        ("00040_00040.png", 0, 20, 8, 10): 0,
    }
    dataset = CocoDetection(tmp_path / "val", file)
    assert len(dataset) == 6 and list(dataset.class_names) == ["tree"]


def test_overlapping_tiles_show_every_box_whole_somewhere(tmp_path, photograph):
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, [88, 58], (40, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(3, 12, (40, 2))], axis=1)
    file = neon_data.cut_tiles(photograph, boxes, side=40, stride=20, folder=tmp_path / "train")
    areas = [a["area"] for a in json.loads(file.read_text())["annotations"] if not a["iscrowd"]]
    for box in boxes:
        whole = (box[2:] - box[:2]).prod()
        assert any(abs(area - whole) < 1e-6 for area in areas)


def test_boxes_are_read_from_pascal_voc(tmp_path):
    path = tmp_path / "boxes.xml"
    corners = "<xmin>1</xmin><ymin>2</ymin><xmax>10</xmax><ymax>20</ymax>"
    path.write_text(f"<annotation><object><name>Tree</name><bndbox>{corners}</bndbox></object></annotation>")
    assert neon_data.read_boxes(path).tolist() == [[0, 1, 10, 20]]


def test_no_run_overwrites_another(tmp_path):
    folder = tmp_path / "run"
    for expected in ("run", "run-2", "run-3"):
        free = neon_trees.free_folder(folder)
        assert free.name == expected
        free.mkdir()


def test_a_file_that_could_not_be_written_whole_is_not_there(tmp_path, monkeypatch):
    def cut_short(path, content):
        open(path, "wb").close()
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", cut_short)
    with pytest.raises(KeyboardInterrupt):
        neon_data.put(tmp_path / "weights.pth", b"all of it")
    assert not (tmp_path / "weights.pth").exists()


def test_ctrl_c_tells_how_to_continue(tmp_path, monkeypatch):
    result = SimpleNamespace(signal=2, steps=7, last=tmp_path / "last.pt")
    monkeypatch.setattr(
        neon_trees, "make_data_set", lambda folder: {"train": (folder, folder), "val": (folder, folder)}
    )
    monkeypatch.setattr(neon_trees.effdet_fast, "train", lambda **options: result)
    monkeypatch.setattr(sys, "argv", ["neon_trees.py", "--output", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match="stopped after 7 steps; to continue: effdet-fast train --resume .*last.pt"):
        neon_trees.main()


def test_the_focal_loss_example_splits_the_loss_as_the_formula_does():
    logits = torch.tensor([[2.0, -1.0], [-3.0, 0.5]])
    labels = torch.tensor([0, -1])
    p = logits.double().sigmoid()
    for gamma in (0.0, 2.0):
        counts, loss = focal_loss.loss_by_part(logits, labels, gamma)
        positive = -((1 - p[0, 0]) ** gamma) * p[0, 0].log()
        hard = sum(-(q**gamma) * (1 - q).log() for q in (p[0, 1], p[1, 1]))
        easy = -(p[1, 0] ** gamma) * (1 - p[1, 0]).log()
        assert counts.tolist() == [1, 2, 1]
        torch.testing.assert_close(loss, torch.stack([positive, hard, easy]))


def test_the_focal_loss_curves_are_the_papers():
    p = torch.tensor([0.1, 0.6, 0.9], dtype=torch.float64)
    for gamma, loss in focal_loss.loss_curves(p).items():
        torch.testing.assert_close(loss, -((1 - p) ** gamma) * p.log())


@pytest.mark.slow
def test_the_comparison_of_necks_writes_table_and_picture(tmp_path, monkeypatch):
    """With small images, and runs that are finished already."""
    monkeypatch.setattr(necks, "SIZE", 64)
    for score, options in enumerate(necks.NECKS.values()):
        run = tmp_path / "runs" / f"{'_'.join(options.values())}_10"
        run.mkdir(parents=True)
        (run / "metrics.json").write_text(json.dumps({"AP": score / 100, "AP50": score / 10}))
    folders = ["--output", str(tmp_path / "runs"), "--docs", str(tmp_path / "docs")]
    monkeypatch.setattr(sys, "argv", ["necks.py", "--rounds", "1", *folders])
    necks.main()
    rows = [line.split(" | ") for line in (tmp_path / "docs" / "necks.md").read_text().splitlines() if " ms " in line]
    assert [row[0].removeprefix("| ") for row in rows] == list(necks.NECKS)
    page = Path(necks.__file__).parents[1] / "docs" / "necks.md"
    published = [line.split(" | ") for line in page.read_text().splitlines() if " ms " in line]
    assert [row[1] for row in rows] == [row[1] for row in published], "parameters do not depend on the image"
    assert [row[5] for row in rows] == ["0.000", "0.010", "0.020", "0.030", "0.040", "0.050"]
    assert all(float(time.removesuffix(" ms")) > 0 for row in rows for time in row[3:5])
    assert Image.open(tmp_path / "docs" / "necks.png").size == (840, 540)
