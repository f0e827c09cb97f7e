from dataclasses import replace

import pytest

from benchmarks import records, report
from tests.benchmarks.test_records import some_record


def test_the_readme_shows_the_committed_records():
    text = report.README.read_text()
    assert text == report.with_table(text, report.generate(records.load_all())), "run `python -m benchmarks.report`"


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


@pytest.mark.parametrize(
    "readme", ["no markers", f"{report.BEGIN}", f"{report.BEGIN}{report.END}{report.BEGIN}{report.END}"]
)
def test_a_readme_without_the_markers_is_refused(readme):
    with pytest.raises(ValueError, match="exactly one"):
        report.with_table(readme, "table")


def test_check_tells_a_difference_and_writing_mends_it(tmp_path, capsys):
    readme, results = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    path = records.new_file(results, some_record())
    path.write_text(records.to_json(some_record()))
    options = ["--readme", str(readme), "--results", str(results)]
    assert report.main([*options, "--check"]) == 1
    assert "-old" in capsys.readouterr().out
    assert report.main(options) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "1.50x" in text
    assert report.main([*options, "--check"]) == 0
    faster = records.new_file(results, some_record())
    faster.write_text(records.to_json(some_record("2026-05-01T00:00:00Z", ours=1e-3)))
    assert report.main([*options, "--check"]) == 1
