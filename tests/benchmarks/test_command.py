"""`python -m benchmarks` on a tiny case."""

from functools import partial

import pytest

from benchmarks import bench_focal_loss
from benchmarks.__main__ import main
from benchmarks.records import load_all
from benchmarks.workload import CHANNELS_LAST, CONTIGUOUS, Case


@pytest.fixture(autouse=True)
def tiny_cases(monkeypatch):
    monkeypatch.setattr(bench_focal_loss, "ANCHORS", 50)
    labels = Case("labels", partial(bench_focal_loss.labels, batch=1, gamma=2.0))
    wide = Case("other", labels.build, layouts=(CHANNELS_LAST, CONTIGUOUS))
    monkeypatch.setattr(bench_focal_loss, "cases", lambda device_type: [labels, wide])


def run(folder, *arguments: str) -> int:
    short = ["--device", "cpu", "--peers", "eager", "--seconds", "0.001", "--output", str(folder)]
    return main(["focal_loss", *short, *arguments])


def test_prints_a_table_and_leaves_a_record_and_a_picture(tmp_path, capsys):
    assert run(tmp_path, "--quick") == 0
    (record,) = load_all(tmp_path)
    assert [(row.op, row.case, row.phase) for row in record.rows] == [
        ("focal_loss", "labels", phase) for phase in ("forward", "backward", "both")
    ]
    assert all(set(row.timings) == {"effdet_fast", "eager"} and row.copy for row in record.rows)
    printed = capsys.readouterr().out
    assert "effdet_fast" in printed and "copy of as many bytes" in printed and "1.00x" in printed
    (picture,) = tmp_path.glob("*.png")
    assert picture.name == f"focal_loss-{record.device_slug}.png" and picture.stat().st_size > 5000


def test_choices(tmp_path):
    assert run(tmp_path, "--phase", "forward", "--case", "other", "--dtype", "bfloat16", "--no-pictures") == 0
    (record,) = load_all(tmp_path)
    assert [(row.case, row.dtype, row.layout) for row in record.rows] == [
        ("other", "bfloat16", "channels_last"),
        ("other", "bfloat16", "contiguous"),
    ]
    assert run(tmp_path, "--phase", "forward", "--case", "other", "--layout", "contiguous", "--no-pictures") == 0
    assert len(load_all(tmp_path)) == 2


def test_a_wrong_op_fails_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_focal_loss.ops, "sigmoid_focal_loss", lambda x, *options: 2 * x.sum())
    assert run(tmp_path, "--quick", "--phase", "forward") == 1
    assert "NOT TIMED: focal_loss, labels, float32 contiguous: wrong result" in capsys.readouterr().out


def test_out_of_time(tmp_path, capsys):
    assert run(tmp_path, "--phase", "forward", "--end-within", "1e-9", "--no-pictures") == 0
    assert "Out of time: 3 of 3 cases were not run." in capsys.readouterr().out
    assert load_all(tmp_path)[0].rows == []


def test_nothing_to_run_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, "--case", "no such case")
    assert "no case fits" in capsys.readouterr().err
