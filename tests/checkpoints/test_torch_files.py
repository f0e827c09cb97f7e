"""Files of torch.save from anywhere: what training scripts store beside weights is read, and nothing else is run."""

import argparse
import os
import pickle
import shutil

import numpy as np
import pytest
import torch

from effdet_fast import Detector
from effdet_fast.checkpoints.files import read_content
from effdet_fast.checkpoints.format import read_checkpoint
from effdet_fast.models import create_model, load_checkpoint
from tests.checks import all_equal

NUMBERS = [
    np.float64(0.375),
    np.float32(-0.1),
    np.float16(2.5),
    np.int64(-(2**40)),
    np.int32(7),
    np.int16(-3),
    np.int8(5),
    np.bool_(True),
    np.uint64(2**63),
    np.uint8(200),
    np.array(0.375, dtype=">f8")[()],
]
READERS = [read_content, Detector.from_checkpoint, read_checkpoint]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: type(number).__name__)
@pytest.mark.parametrize("zipped", [True, False])
def test_numbers_of_numpy_are_read_as_pythons(tmp_path, number, zipped):
    torch.save({"metric": number}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    read = read_content(tmp_path / "a.pt")["metric"]
    assert read == number and type(read) is type(number.item())


def test_numbers_of_numpy_1(tmp_path):
    torch.save({"metric": np.float64(0.25)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "a.pt").read_bytes()
    assert b"numpy._core.multiarray" in content
    (tmp_path / "a.pt").write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert read_content(tmp_path / "a.pt") == {"metric": 0.25}


def test_what_effdets_training_writes(tmp_path):
    """timm's CheckpointSaver with effdet's metric, of a model under torch.compile and DistributedDataParallel."""
    source, model = (create_model("efficientdet_lite0", 2, image_size=64) for _ in range(2))
    weights = {f"module._orig_mod.model.{key}": value for key, value in source.state_dict().items()}
    content = {
        "epoch": 3,
        "arch": "tf_efficientdet_lite0",
        "state_dict": weights,
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "version": 2,
        "args": argparse.Namespace(model="tf_efficientdet_lite0", lr=0.1),
        "metric": np.float64(0.31),
    }
    torch.save(content, tmp_path / "model_best.pth.tar")
    assert not load_checkpoint(model, tmp_path / "model_best.pth.tar")
    assert all_equal(model.state_dict().values(), source.state_dict().values())


class Planted:
    def __init__(self, run, path):
        self.run, self.path = run, path

    def __reduce__(self):
        return self.run, (self.path,)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("run, name", [(os.mkdir, "posix.mkdir"), (shutil.rmtree, "shutil.rmtree")])
def test_objects_are_named_and_nothing_runs(tmp_path, read, run, name):
    torch.save({"state_dict": {}, "extra": Planted(run, str(tmp_path / "ran"))}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=f"a.pt: cannot be read as a checkpoint .*: it holds a {name}$") as raised:
        read(tmp_path / "a.pt")
    assert "weights_only" not in str(raised.value) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"epoch 3, loss 0.5\n",
        b"\x80\x04",
        b"PK\x03\x04 cut",
        pickle.dumps({"a": 1})[:-4],
        b"version https://git-lfs",
    ],
)
def test_other_files_give_a_sentence(tmp_path, read, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(
        ValueError, match="a.pt: cannot be read as a checkpoint .*: torch.save did not write it"
    ) as raised:
        read(tmp_path / "a.pt")
    assert "weights_only" not in str(raised.value) and len(str(raised.value)) < 200 + len(str(tmp_path))


@pytest.mark.parametrize("read", READERS)
def test_a_file_cut_short(tmp_path, read):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "a.pt")
    (tmp_path / "a.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:2000])
    with pytest.raises(ValueError, match="or it was cut short"):
        read(tmp_path / "a.pt")


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_a_folder_is_no_checkpoint(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(FileNotFoundError, match=f"{name}: no such checkpoint"):
        read_content(tmp_path / name)


def test_numbers_that_are_none_are_named(tmp_path):
    torch.save({"note": np.str_("best")}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="it holds a value of NumPy's type U4"):
        read_content(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error"), MemoryError()]
)
def test_what_the_machine_refuses_is_no_fault_of_the_file(tmp_path, monkeypatch, error):
    def load(*_, **__):
        raise error

    torch.save({}, tmp_path / "a.pt")
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(type(error)) as raised:
        read_content(tmp_path / "a.pt")
    assert raised.value is error
