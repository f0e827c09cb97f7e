import csv
import errno
import json
import subprocess
import sys

import pytest

from effdet_fast.training import run_folder
from effdet_fast.training.run_folder import COLUMNS, RunFolder


def test_a_run_is_never_replaced_unasked(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.check_free(overwrite=False, resumed_from=None)
    folder.claim(overwrite=False, resumed_from=None)
    folder.last.write_text("weights")
    (folder.path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"already holds a run \(last.pt\): pass --resume .*last.pt .*--overwrite"):
        folder.check_free(overwrite=False, resumed_from=None)
    with pytest.raises(ValueError, match="already holds a run"):
        folder.check_free(overwrite=False, resumed_from=tmp_path / "elsewhere" / "last.pt")
    assert folder.last.read_text() == "weights"
    folder.check_free(overwrite=False, resumed_from=folder.last)
    folder.claim(overwrite=False, resumed_from=folder.last)
    assert folder.last.exists()
    folder.check_free(overwrite=True, resumed_from=None)
    folder.claim(overwrite=True, resumed_from=None)
    assert not folder.last.exists()
    assert (folder.path / "notes.txt").exists()


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match="exists and is not a folder"):
        RunFolder(tmp_path / "run").check_free(overwrite=True, resumed_from=None)


def test_results_have_one_row_per_epoch_and_blanks_without_evaluation(tmp_path):
    folder = RunFolder(tmp_path)
    rows = [{"epoch": 1, "step": 4, "loss": 0.5}, {"epoch": 2, "step": 8, "loss": 0.25, "AP": 0.125}]
    folder.write_results(rows[:1])
    folder.write_results(rows)
    with open(tmp_path / "results.csv") as file:
        read = list(csv.DictReader(file))
    assert tuple(read[0]) == COLUMNS
    assert [row["epoch"] for row in read] == ["1", "2"]
    assert read[0]["AP"] == "" and float(read[1]["AP"]) == 0.125


def test_a_failure_is_written_down(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_failure(7, [3, 5], "non-finite loss")
    assert json.loads(folder.failure.read_text()) == {"step": 7, "image_ids": [3, 5], "message": "non-finite loss"}


HOLD = """
import sys
from effdet_fast.training import run_folder
from effdet_fast.training.run_folder import RunFolder
folder = RunFolder(sys.argv[1])
folder.claim(overwrite=False, resumed_from=None)
print("claimed", flush=True)
sys.stdin.read()
"""


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, folder.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"claimed\n"
        for resumed_from in (None, folder.last):
            with pytest.raises(ValueError, match="run is being written by another run"):
                folder.claim(overwrite=True, resumed_from=resumed_from)
        other.kill()
    folder.claim(overwrite=False, resumed_from=None)
    folder.release()
    assert not list(folder.path.iterdir())


def test_what_killed_runs_were_writing_is_cleared(tmp_path):
    for name in (".0123456789abcdef.last.pt", ".4711.best.pt", ".0123456789abcdef.notes.txt", ".hidden.last.pt"):
        (tmp_path / name).write_text("half")
    folder = RunFolder(tmp_path)
    folder.claim(overwrite=False, resumed_from=None)
    folder.release()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".0123456789abcdef.notes.txt", ".hidden.last.pt"]


def test_the_folder_is_looked_at_again_once_it_is_ours(tmp_path):
    folder = RunFolder(tmp_path)
    folder.check_free(overwrite=False, resumed_from=None)
    folder.last.write_text("of a run that has ended since")
    with pytest.raises(ValueError, match="already holds a run"):
        folder.claim(overwrite=False, resumed_from=None)
    folder.release()
    assert folder.last.exists()


def test_two_runs_of_one_process_do_not_write_to_one_folder(tmp_path):
    first, second = RunFolder(tmp_path), RunFolder(tmp_path / ".." / tmp_path.name)
    first.claim(overwrite=False, resumed_from=None)
    with pytest.raises(ValueError, match="is being written by another run"):
        second.claim(overwrite=False, resumed_from=None)
    second.release()
    with pytest.raises(ValueError, match="is being written by another run"):
        second.claim(overwrite=False, resumed_from=None)
    first.release()
    second.claim(overwrite=False, resumed_from=None)
    second.release()


def test_file_systems_without_locks_can_be_written_to(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_folder.fcntl, "lockf", no_locks)
    folder = RunFolder(tmp_path)
    folder.claim(overwrite=False, resumed_from=None)
    folder.release()
    assert not list(tmp_path.iterdir())
