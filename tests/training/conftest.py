"""Runs of a tiny detector on generated pictures."""

import json

import pytest

from effdet_fast.training import run, run_data, train
from tests.generated_data import make_dataset
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


@pytest.fixture
def own_data(tmp_path):
    """A data set that a test may change: its folder, its annotations file and that file's content."""
    images, annotations = make_dataset(tmp_path / "own", images=IMAGES, size=(40, 48))
    return images, annotations, json.loads(annotations.read_text())
