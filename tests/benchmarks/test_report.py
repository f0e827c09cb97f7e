import json
from dataclasses import replace

import pytest

from benchmarks import records, report
from benchmarks.records import Timing
from tests.benchmarks.test_records import some_record


@pytest.mark.parametrize(
    "path, wanted", report.written(records.load_all()).items(), ids=lambda value: getattr(value, "name", "")
)
def test_pages_show_the_committed_records(path, wanted):
    assert path.read_text() == wanted, "run `python -m benchmarks.report`"


def test_every_committed_record_is_shown_or_cited():
    """docs/benchmarks.md shows the newest of a device and op; other pages name the files of theirs."""
    everything = records.load_all()
    newest = [records.newest_rows(everything, slug).values() for slug in {each.device_slug for each in everything}]
    shown = {record.date for of_device in newest for record, _ in of_device}
    pages = "".join(page.read_text() for page in (report.ROOT / "docs").rglob("*.md"))
    files = {file.name: json.loads(file.read_text()) for file in records.RESULTS.rglob("*.json")}
    dates = {name: record.get("environment", record)["date"] for name, record in files.items()}
    assert not [name for name, date in dates.items() if date not in shown and name not in pages]


def test_the_best_geometry_of_each_op():
    """With backward where there is one, beside the range of all; then the training steps."""
    text = report.generate_best([some_record(), some_step()])
    assert "| focal_loss: a case, with backward | 2.00 ms | 3.00 ms (torch.compile) | 1.50x | 1.50x to 1.50x |" in text
    assert "| training step: a case | 500 ms | 2000 ms (effdet) | 4.00x |  |" in text
    slow = some_step()
    slow.rows[0].timings["effdet"] = replace(slow.rows[0].timings["effdet"], first=188.2)
    assert "| 2000 ms (effdet, first step 188 s) | 4.00x |" in report.generate_best([slow])
    assert "Operators: A CPU (2026-01-02). Training steps: A CPU (2026-01-02)." in text and text.endswith(report.NO_GPU)


def test_a_table_per_device():
    text = report.generate([some_record(), some_record(device_type="cuda")])
    gpu, cpu = text.split("\n\n**A CPU**")
    assert gpu.startswith("**A CUDA** (2026-01-02, PyTorch 2.11.0, CUDA 13.0, commit 0123456789)")
    row = "| focal_loss | a case | float32, contiguous | forward + backward | 2.00 ms | 50 % | 3.00 ms (torch.compile) | 1.50x |"
    assert row in gpu and row in cpu
    assert "backward |" in cpu and "| backward |" not in cpu


def test_no_share_of_a_tiny_copy():
    record = some_record()
    record.rows = [replace(record.rows[0], bytes=1000)]
    assert "| forward | 2.00 ms |  | 3.00 ms" in report.generate([record])


def test_what_was_not_measured_is_said():
    assert report.generate([]) == f"{report.NO_GPU}\n\n{report.NO_CPU}"
    record = some_record()
    record.rows = [
        records.Row("nms", "x", "float32", "contiguous", "forward", 1, problems={"effdet_fast": "wrong result: off"})
    ]
    text = report.generate([record])
    assert "| nms | x | float32, contiguous | forward | wrong result: off |" in text
    assert report.NO_GPU in text


def some_step(device_type="cpu"):
    record = some_record(device_type=device_type, ops=("training_step",))
    timings = {
        "effdet_fast": Timing(0.5, 0.5, 0.5, 3, peak_bytes=3_000_000, first=1.7),
        "effdet": Timing(2.0, 2.0, 2.0, 3),
    }
    profiles = {
        "effdet_fast": records.Profile(70, {"loss": 0.001, "rest": 0.002}),
        "effdet": records.Profile(800, {"fusion": 0.004, "loss": 0.010}),
    }
    step = replace(
        record.rows[0], phase="step", images=4, timings=timings, profiles=profiles, problems={"gone": "not installed"}
    )
    return replace(record, rows=[step])


def test_a_table_of_training_steps_and_of_where_their_time_goes():
    text = report.generate_steps([some_step()])
    assert report.NO_GPU in text
    assert "| | images/s | step | against effdet | first step | peak memory | operator calls |" in text
    assert "| effdet | 2.00 | 2000 ms | 1.00x |  |  | 800 |" in text
    assert "| effdet_fast | 8.00 | 500 ms | 4.00x | 2 s | 3 MB | 70 |" in text
    assert "| gone | not installed | | | | | |" in text
    assert "| loss | 1 | 10 |\n| rest | 2 |  |\n| fusion |  | 4 |" in text
    assert "training_step" not in report.generate([some_step()])


def test_on_a_gpu_kernel_launches_are_counted():
    text = report.generate_steps([some_step("cuda")])
    assert "kernel launches" in text and report.NO_GPU not in text


@pytest.mark.parametrize(
    "readme", ["no markers", f"{report.BEGIN}", f"{report.BEGIN}{report.END}{report.BEGIN}{report.END}"]
)
def test_a_readme_without_the_markers_is_refused(readme):
    with pytest.raises(ValueError, match="exactly one"):
        report.with_table(readme, "table")


def test_check_tells_a_difference_and_writing_mends_it(tmp_path, capsys):
    readme, results = tmp_path / "README.md", tmp_path / "results"
    (tmp_path / "docs").mkdir()
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    path = records.new_file(results, some_record())
    path.write_text(records.to_json(some_record()))
    options = ["--root", str(tmp_path), "--results", str(results)]
    assert report.main([*options, "--check"]) == 1
    assert "-old" in capsys.readouterr().out
    assert report.main(options) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "1.50x" in text
    assert "| 1.50x |" in (tmp_path / "docs" / "benchmarks.md").read_text()
    assert report.main([*options, "--check"]) == 0
    faster = records.new_file(results, some_record())
    faster.write_text(records.to_json(some_record("2026-05-01T00:00:00Z", ours=1e-3)))
    assert report.main([*options, "--check"]) == 1
