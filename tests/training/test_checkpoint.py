import pytest
import torch

from effdet_fast.training import checkpoint as checkpoint_module
from effdet_fast.training.checkpoint import load_run_checkpoint, save_atomically, training_state


def _content(value):
    return {"format": 1, "model": "efficientdet_lite0", "state_dict": {"w": torch.full((3,), value)}}


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_atomically(_content(1.0), path)

    def torn(content, file):
        file.write(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint_module.torch, "save", torn)
    with pytest.raises(OSError, match="no space"):
        save_atomically(_content(2.0), path)
    assert load_run_checkpoint(path)["state_dict"]["w"][0] == 1.0
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.pt"]


def test_unusable_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.pt: no such checkpoint"):
        load_run_checkpoint(tmp_path / "absent.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match="text.pt: cannot be read as a checkpoint"):
        load_run_checkpoint(tmp_path / "text.pt")
    save_atomically({"w": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="holds no format"):
        load_run_checkpoint(tmp_path / "other.pt")
    save_atomically({**_content(0.0), "format": 99}, tmp_path / "later.pt")
    with pytest.raises(ValueError, match="checkpoint format 99"):
        load_run_checkpoint(tmp_path / "later.pt")
    with pytest.raises(ValueError, match="resume from the run's last.pt"):
        training_state(_content(0.0), "best.pt")
    absent = "last.pt cannot be resumed: it has no config, batch, .*metrics, category_ids, class_names"
    with pytest.raises(ValueError, match=absent):
        training_state({**_content(0.0), "training": {"epoch": 1}}, "last.pt")
    with pytest.raises(ValueError, match="last.pt cannot be resumed: it has no config"):
        training_state({**_content(0.0), "training": "all"}, "last.pt")
