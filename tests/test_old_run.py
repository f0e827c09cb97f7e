"""A run that an earlier version stopped after 40 epochs: its detector finds the same, and the run goes on.

It learned shapes of generated_data on a model small enough to lie here: EfficientDet with a backbone of a tenth of the width.
"""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from effdet_fast import Detector, train
from tests.generated_data import make_dataset

OLD_RUN = Path(__file__).parent / "old_run"
EXPECTED = json.loads((OLD_RUN / "expected.json").read_text())


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the run's options name its data by relative paths
    return make_dataset("data", images=8, size=(64, 64))[0]


@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
def test_its_detector_finds_the_same(images, name):
    detector = Detector.from_checkpoint(OLD_RUN / name, device="cpu")
    (found,) = detector.predict([images / "picture_000.png"], score_threshold=0.0, max_detections=5)
    np.testing.assert_array_equal(found.labels, EXPECTED["labels"])
    np.testing.assert_allclose(found.scores, EXPECTED["scores"], rtol=1e-4)
    np.testing.assert_allclose(found.boxes, EXPECTED["boxes"], atol=1e-2)


def test_it_goes_on(images):
    shutil.copytree(OLD_RUN, "run")
    with pytest.warns(UserWarning, match="40 -> 41 epochs"):
        result = train(resume="run/last.pt", epochs=41, output="longer")
    assert (result.epochs, result.steps) == (41, 82)
    with open("longer/results.csv") as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["loss"]) == pytest.approx(EXPECTED["loss"], rel=1e-3)
    old, new = (torch.load(folder / "last.pt", weights_only=True) for folder in (OLD_RUN, Path("longer")))
    assert set(keys_of(new)) == set(keys_of(old))


def keys_of(content, path=""):
    for key, value in content.items():
        yield f"{path}{key}"
        if isinstance(value, dict):
            yield from keys_of(value, f"{path}{key}.")
