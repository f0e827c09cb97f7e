"""`python -m benchmarks` on a tiny case."""

from functools import partial

import pytest
import torch

from benchmarks import bench_focal_loss
from benchmarks.__main__ import CUT_SHORT, DEVICE_LOST, NOT_REACHED, main, parser, selected
from benchmarks.records import from_json, load_all
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
    assert "NOT TIMED: focal_loss, labels, float32, contiguous: wrong result" in capsys.readouterr().out


def test_out_of_time(tmp_path, capsys):
    assert run(tmp_path, "--phase", "forward", "--end-within", "1e-9", "--no-pictures") == 0
    assert "Out of time: 3 of 3 cases were not run." in capsys.readouterr().out
    assert load_all(tmp_path)[0].rows == []


def test_a_record_is_gone_on_with(tmp_path, monkeypatch):
    """What it holds is not measured again, nor what ended its process; what was not reached is."""
    path, other = tmp_path / "record.json", tmp_path / "other"
    one = ["--phase", "forward", "--no-pictures", "--record", str(path)]
    assert run(other, *one, "--case", "labels") == 0
    assert run(other, *one, "--end-within", "1e-9") == 0
    record = from_json(path.read_text())
    assert [row.case for row in record.rows] == ["labels"]
    names = [f"focal_loss, other, float32, {layout}" for layout in (CHANNELS_LAST, CONTIGUOUS)]
    assert record.missing == dict.fromkeys(names, NOT_REACHED)

    class Killed(BaseException):
        pass

    def killed(*given, **options):
        raise Killed
        yield

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("benchmarks.__main__.measure", killed)
        run(other, *one)
    assert from_json(path.read_text()).missing == {names[0]: CUT_SHORT, names[1]: NOT_REACHED}
    assert run(other, *one) == 1
    record = from_json(path.read_text())
    assert [(row.case, row.layout) for row in record.rows] == [("labels", CONTIGUOUS), ("other", CONTIGUOUS)]
    assert record.missing == {names[0]: CUT_SHORT} and not other.exists()


def test_a_case_that_fails_costs_no_other(tmp_path, monkeypatch, capfd):
    def breaks(*given):
        raise ValueError("no data\nand more")

    of_file = bench_focal_loss.cases("cpu")
    monkeypatch.setattr(bench_focal_loss, "cases", lambda device_type: [Case("broken", breaks), *of_file])
    assert run(tmp_path, "--phase", "forward", "--no-pictures") == 1
    (record,) = load_all(tmp_path)
    assert record.missing == {"focal_loss, broken, float32, contiguous": "failed: ValueError: no data"}
    assert len(record.rows) == 3
    assert (
        "NOT MEASURED: focal_loss, broken, float32, contiguous: failed: ValueError: no data" in capfd.readouterr().out
    )


def test_the_process_ends_where_the_device_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.__main__.answers", lambda device: False)
    path = tmp_path / "record.json"
    assert run(tmp_path, "--phase", "forward", "--no-pictures", "--record", str(path)) == DEVICE_LOST
    assert len(from_json(path.read_text()).rows) == 1


def test_torch_compile_for_the_first_case_alone():
    arguments = parser().parse_args(["focal_loss", "--compiled", "first"])
    assert [each.compiled for each in selected(arguments, torch.device("cpu"))] == [True, False, False]


def test_convolutions_of_float32_are_measured_with_tf32_and_without(monkeypatch):
    case = Case("convolution", bench_focal_loss.cases("cpu")[0].build, convolves=True)
    monkeypatch.setattr(bench_focal_loss, "cases", lambda device_type: [case])
    found = {
        device: [(str(each.dtype), each.tf32) for each in selected(parser().parse_args(["focal_loss"]), device)]
        for device in map(torch.device, ("cpu", "cuda"))
    }
    assert list(found.values()) == [
        [("torch.float32", None)],
        [("torch.bfloat16", None), ("torch.float32", False), ("torch.float32", True)],
    ]


def test_nothing_to_run_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, "--case", "no such case")
    assert "no case fits" in capsys.readouterr().err
