import pytest
import torch

from effdet_fast.checkpoints import files
from effdet_fast.checkpoints.files import write_content
from effdet_fast.checkpoints.format import describe, read_checkpoint
from effdet_fast.models import model_config
from effdet_fast.training.checkpoint import read_run_checkpoint

DESCRIPTION = describe(model_config("efficientdet_lite0", num_classes=1), ["thing"], [1])


def _content(value, **more):
    return {**DESCRIPTION, "state_dict": {"w": torch.full((3,), value)}, **more}


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    write_content(_content(1.0), path)

    def torn(content, file):
        file.write(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(files.torch, "save", torn)
    with pytest.raises(OSError, match="no space"):
        write_content(_content(2.0), path)
    assert read_checkpoint(path)["state_dict"]["w"][0] == 1.0
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.pt"]


def test_unusable_files_are_named(tmp_path):
    def refused(message, content):
        write_content(content, tmp_path / "last.pt")
        with pytest.raises(ValueError, match=f"last.pt.*{message}"):
            read_run_checkpoint(tmp_path / "last.pt")

    with pytest.raises(FileNotFoundError, match="absent.pt: no such checkpoint"):
        read_run_checkpoint(tmp_path / "absent.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match="text.pt: cannot be read as a checkpoint"):
        read_run_checkpoint(tmp_path / "text.pt")
    refused("it has no format, model, .*state_dict", {"w": torch.zeros(1)})
    refused("checkpoint format 99", _content(0.0, format=99))
    refused("resume from the run's last.pt", _content(0.0))
    refused("cannot be resumed: it has no config, batch, .*metrics", _content(0.0, training={"epoch": 1}))
    refused("cannot be resumed: it has no config, epoch", _content(0.0, training="all"))
