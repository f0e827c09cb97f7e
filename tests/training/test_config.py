import json
from pathlib import Path

import pytest

from effdet_fast.files import write_json
from effdet_fast.training.config import TrainConfig, config_for_resume, config_from_options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"lr": float("inf")}, "lr must be finite, got inf"),
        ({"clip_grad_norm": float("nan")}, "clip_grad_norm must be finite, got nan"),
        ({"scale_jitter": (0.1, float("inf"))}, "scale_jitter must be finite"),
        ({"lr": -0.1}, "lr must be above 0, got -0.1"),
        ({"optimizer": "lion"}, "optimizer must be one of sgd, adamw, got 'lion'"),
        ({"amp": "fp8"}, "amp must be one of none, bf16, fp16, got 'fp8'"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1.0"),
        ({"epochs": 3, "warmup_epochs": 3.0}, "warmup_epochs must be at least 0 and below epochs"),
        ({"scale_jitter": (2.0, 0.1)}, "scale_jitter must be two factors"),
        ({"image_size": (64, 64, 64)}, "image_size must be one size or"),
        ({"model_options": {"num_classes": 3, "neck": "fpn"}}, "model_options must be without num_classes, got"),
        ({"val_images": "x"}, "val_images and val_annotations must be given together"),
        ({"checkpoint": "a", "backbone_checkpoint": "b"}, "already holds a backbone"),
    ],
)
def test_bad_values_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        config_from_options(options)


def test_unknown_options_are_named():
    with pytest.raises(TypeError, match="unknown options: learning_rate; known: amp"):
        config_from_options({"learning_rate": 1.0})


def test_a_missing_path_is_named():
    with pytest.raises(ValueError, match="train_annotations is missing"):
        TrainConfig(train_images="a", output="b").require_paths()


def test_defaults_follow_the_optimizer_and_the_length():
    sgd = TrainConfig(epochs=50)
    assert (sgd.learning_rate(32), sgd.decay(), sgd.warmup()) == (0.04, 4e-5, 1.0)
    adamw = TrainConfig(optimizer="adamw", epochs=4)
    assert (adamw.learning_rate(32), adamw.decay(), adamw.warmup()) == (1e-3, 1e-2, 0.4)
    assert TrainConfig(lr=0.3).learning_rate(32) == 0.3
    assert TrainConfig(image_size=96).image_size == (96, 96)


def test_the_file_of_options_reads_back(tmp_path):
    config = TrainConfig(train_images="a", image_size=(64, 96))
    write_json(str(tmp_path / "config.json"), config.to_dict(), indent=2)
    assert config_from_options(json.loads((tmp_path / "config.json").read_text())) == config


def test_resuming_keeps_the_runs_options_and_takes_what_may_change():
    saved = TrainConfig(train_images="a", lr=0.1, epochs=5, overwrite=True).to_dict()
    config = config_for_resume(saved, {"resume": "last.pt", "epochs": 8, "workers": 0, "cuda_graph": True})
    assert (config.lr, config.epochs, config.workers, config.overwrite, config.cuda_graph) == (0.1, 8, 0, False, True)


def test_resuming_refuses_what_would_make_it_another_run():
    saved = TrainConfig(lr=0.1, image_size=96).to_dict()
    assert config_for_resume(saved, {"image_size": 96, "lr": 0.1}).image_size == (96, 96)
    del saved["model_options"]  # as in a run from before there were any
    assert config_for_resume(saved, {"model_options": {}}).model_options == {}
    with pytest.raises(ValueError, match=r"cannot change .*lr \(0.1 -> 0.2\).* pass them as checkpoint"):
        config_for_resume(saved, {"lr": 0.2})


def test_the_page_of_options_is_current(monkeypatch):
    """docs/training_options.md is what `python docs/training_options_page.py` prints."""
    docs = Path(__file__).parents[2] / "docs"
    monkeypatch.syspath_prepend(docs)
    import training_options_page

    assert training_options_page.page() == (docs / "training_options.md").read_text()
