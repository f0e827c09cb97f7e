import subprocess

import pytest
import torch

from benchmarks import environment
from benchmarks.__main__ import save
from benchmarks.records import (
    Profile,
    Record,
    Row,
    Timing,
    from_json,
    load_all,
    new_file,
    newest_rows,
    quantile,
    to_json,
)


def some_record(date="2026-01-02T03:04:05Z", device_type="cpu", ours=2e-3, ops=("focal_loss",)) -> Record:
    device = {"type": device_type, "name": f"A {device_type.upper()}", "slug": f"a-{device_type}"}
    versions = {"torch": "2.11.0", "cuda": "13.0" if device_type == "cuda" else None}
    timings = {
        "effdet_fast": Timing(ours, ours * 0.9, ours * 1.1, 7, 1e-7, 4096),
        "eager": Timing(9e-3, 8e-3, 1e-2, 7, 1e-8),
        "torch.compile": Timing(3e-3, 3e-3, 4e-3, 7, 1e-8),
    }
    rows = [
        Row(
            op,
            "a case",
            "float32",
            "contiguous",
            phase,
            4_000_000,
            Timing(1e-3, 1e-3, 1e-3, 7),
            timings,
            {"effdet": "absent"},
        )
        for op in ops
        for phase in ("forward", "backward", "both")
    ]
    return Record(
        {
            "date": date,
            "device": device,
            "versions": versions,
            "commit": "0123456789ab" * 3,
            "uncommitted_changes": False,
        },
        rows,
    )


def test_quantiles():
    assert quantile([3.0], 0.2) == 3.0
    assert quantile([5.0, 1.0, 3.0, 2.0, 4.0, 6.0], 0.2) == 2.0
    assert quantile([0.0, 1.0], 0.8) == pytest.approx(0.8)
    timing = Timing.of([4.0, 1.0, 2.0, 3.0, 100.0, 5.0])
    assert (timing.median, timing.q20, timing.q80, timing.rounds) == (3.5, 2.0, 5.0, 6)


def test_figures_of_a_row():
    row = some_record().rows[0]
    assert row.best_peer[0] == "torch.compile"
    assert row.speed_up == pytest.approx(1.5)
    assert row.copy_percent(row.ours) == pytest.approx(50)
    assert row.gigabytes_per_second(row.ours) == pytest.approx(2.0)


def test_processors_of_one_name_are_told_apart_by_their_vectors():
    record, gpu = some_record(), some_record(device_type="cuda")
    assert (record.device_name, record.device_slug) == ("A CPU", "a-cpu")
    for each in (record, gpu):
        each.environment["build"] = {"cpu_level": "avx2"}
    assert (record.device_name, record.device_slug) == ("A CPU, avx2", "a-cpu-avx2")
    assert (gpu.device_name, gpu.device_slug) == ("A CUDA", "a-cuda")


def test_what_runs_on_our_operators_is_no_peer():
    row = some_record().rows[0]
    row.timings["effdet_fast on effdet"] = Timing(1e-3, 1e-3, 1e-3, 7)
    assert row.best_peer[0] == "torch.compile"


def test_json_brings_everything_back():
    record = some_record()
    record.rows.append(
        Row("nms", "empty", "float32", "contiguous", "forward", 1, problems={"effdet_fast": "wrong result"})
    )
    profiles = {"effdet": Profile(7, {"loss": 0.5})}
    record.rows.append(Row("training_step", "a", "float32", "contiguous", "step", 1, images=4, profiles=profiles))
    assert from_json(to_json(record)) == record


def test_another_format_is_refused():
    with pytest.raises(ValueError, match="format must be 1, got 2"):
        from_json('{"format": 2, "environment": {}, "rows": []}')


def test_no_file_is_overwritten(tmp_path):
    record = some_record()
    paths = [new_file(tmp_path, record) for _ in range(3)]
    assert [path.name for path in paths] == [
        "a-cpu-2026-01-02.json",
        "a-cpu-2026-01-02-2.json",
        "a-cpu-2026-01-02-3.json",
    ]
    for path in paths:
        save(record, path)
    assert load_all(tmp_path) == [record] * 3
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_the_newest_rows_of_each_op():
    old = some_record("2026-01-01T00:00:00Z", ours=5e-3, ops=("focal_loss", "nms"))
    new = some_record("2026-02-01T00:00:00Z", ours=1e-3, ops=("focal_loss",))
    other = some_record("2026-03-01T00:00:00Z", device_type="cuda", ops=("nms",))
    newest = newest_rows([old, new, other], "a-cpu")
    assert newest["focal_loss"] == (new, new.rows)
    assert newest["nms"] == (old, old.rows[3:])


def test_the_environment_says_what_was_measured_with_what():
    described = environment.describe(torch.device("cpu"), ["nms", "--case", "a b"])
    assert described["device"]["type"] == "cpu" and described["device"]["slug"]
    assert described["versions"]["torch"] == torch.__version__
    assert described["threads"] == torch.get_num_threads()
    assert described["command"] == "python -m benchmarks nms --case 'a b'"
    assert {"date", "build", "commit", "uncommitted_changes"} <= described.keys()
    assert described["build"]["cpu_level"] in ("baseline", "avx2", "avx512")  # part of a record's name


def test_a_new_source_file_is_an_uncommitted_change_and_a_new_record_is_not(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "effdet_fast").mkdir()
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    (tmp_path / "benchmarks" / "results" / "record.json").touch()
    assert environment.commit_of(tmp_path)[1] is False
    (tmp_path / "effdet_fast" / "new.py").touch()
    assert environment.commit_of(tmp_path)[1] is True


def test_outside_a_repository_the_commit_is_unknown_or_told(tmp_path, monkeypatch):
    monkeypatch.delenv("EFFDET_FAST_COMMIT", raising=False)
    assert environment.commit_of(tmp_path) == (None, None)
    monkeypatch.setenv("EFFDET_FAST_COMMIT", "abc")
    assert environment.commit_of(tmp_path) == ("abc", None)
