"""The order, the limits and the summary of `make gpu`, with commands that need no GPU."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, steps
from benchmarks.steps import FAILED, OK, OUT_OF_TIME, SKIPPED, Step


def python(name: str, code: str, limit: float = 20.0, **options) -> Step:
    return Step(name, [sys.executable, "-c", code], limit, **options)


def test_good_bad_and_skipped_steps(capfd):
    log = io.StringIO()
    results = steps.run_all(
        [
            python(
                "speaks",
                "import os; print('one\\ntwo\\n' + os.environ['WORD'])",
                environment={"WORD": "three"},
                output_lines=2,
            ),
            python("fails", "import sys; print('why', file=sys.stderr); sys.exit(3)"),
            python("depends", "print('never')", needs=("speaks", "fails")),
            python("left out", "print('never')", skip="no such tool"),
            Step("no program", ["/no/such/program"], 5.0),
            python("last", "pass", needs=("speaks",)),
        ],
        60.0,
        log,
    )
    assert [r.status for r in results] == [OK, FAILED, FAILED, SKIPPED, FAILED, OK]
    assert [r.detail for r in results[:4]] == ["two\nthree", "why", "not run: it needs fails", "no such tool"]
    assert "/no/such/program" in results[4].detail
    assert [r.good for r in results] == [True, False, False, True, False, True]
    assert "one\ntwo\nthree\n" in log.getvalue() and "one\ntwo\nthree\n" in capfd.readouterr().out
    lines = steps.summary(results).splitlines()
    assert lines[0].split()[:2] == ["speaks", "ok"] and lines[1:3] == ["    two", "    three"]


def is_running(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_step_over_its_limit_ends_with_all_it_started(tmp_path):
    child = tmp_path / "child"
    code = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(child)!r}, "w").write(str(process.pid))
print("started", flush=True)
time.sleep(60)
"""
    start = time.monotonic()
    (result,) = steps.run_all([python("hangs", code, limit=4.0)], 60.0)
    assert time.monotonic() - start < 25
    assert (result.status, result.detail) == (OUT_OF_TIME, "started")
    while is_running(child.read_text()):
        assert time.monotonic() - start < 30


@pytest.mark.parametrize("interrupts", [signal.default_int_handler, signal.SIG_IGN])
def test_an_interrupted_step_can_still_write_what_it_has(interrupts, monkeypatch):
    monkeypatch.setattr(steps, "GRACE_SECONDS", 20.0)  # a busy machine may take its time
    code = """
import time
try:
    print("up", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("saved", flush=True)
"""
    before = signal.signal(signal.SIGINT, interrupts)
    try:
        (result,) = steps.run_all([python("saves", code, limit=4.0)], 60.0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (result.status, result.detail) == (OUT_OF_TIME, "up\nsaved")


def test_the_limit_of_all_steps_cuts_the_last_ones():
    limit = steps.GRACE_SECONDS + 2.0
    start = time.monotonic()
    results = steps.run_all(
        [python("long", "import time; time.sleep(60)", limit=50.0), python("late", "print('never')")], limit
    )
    assert time.monotonic() - start < limit + 3 * steps.GRACE_SECONDS
    assert [r.status for r in results] == [OUT_OF_TIME, OUT_OF_TIME]
    assert results[1].detail == "not run: no time left"


def test_steps_that_share_split_what_is_left():
    echo = "import sys; print(sys.argv[1])"
    share = dict(limit=100.0, share=True)
    planned = [Step(str(i), [sys.executable, "-c", echo, "{limit}"], **share) for i in range(3)]
    seconds = [float(r.detail) for r in steps.run_all(planned, 63.0)]
    assert 15 <= seconds[0] <= 18 and 20 <= seconds[1] <= 28.5 and 30 <= seconds[2] <= 60


def test_the_plan():
    planned = gpu.steps("/opt/compute-sanitizer", Path("/somewhere"), pictures=False)
    assert [s.name for s in planned] == [
        "build",
        "tests",
        "memcheck",
        "racecheck",
        "initcheck",
        *(f"benchmark {op}" for op in gpu.BENCHMARKS),
    ]
    by_name = {s.name: s for s in planned}
    assert by_name["build"].environment["EFFDET_FAST_CUDA"] == "1"
    assert by_name["tests"].command[1:6] == ["-m", "pytest", "-q", "-m", "cuda and not slow"]
    assert "tests/ops/test_focal_loss.py" in by_name["tests"].command
    assert "tests/benchmarks/test_report.py" not in by_name["tests"].command
    assert by_name["racecheck"].command[:3] == ["/opt/compute-sanitizer", "--tool", "racecheck"]
    assert by_name["memcheck"].environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    assert by_name["benchmark nms"].command[2:6] == ["benchmarks", "nms", "--device", "cuda"]
    assert all(s.needs == ("build",) for s in planned[1:]) and gpu.LIMIT < 9 * 60
    assert by_name["memcheck"].command[3:7] == ["--error-exitcode", "86", "--report-api-errors", "no"]
    without = {s.name: s for s in gpu.steps(None, Path("/somewhere"), pictures=True)}
    assert without["initcheck"].skip == "compute-sanitizer is not installed"
    assert "--no-pictures" not in without["benchmark nms"].command


def write_library(root: Path, device: str, **info: str) -> None:
    (root / "effdet_fast").mkdir(exist_ok=True)
    text = f"effdet_fast build info: {json.dumps(info)}"
    (root / f"effdet_fast/kernels_{device}.so").write_bytes(b"\0" + text.encode() + b"\0")


def test_libraries_are_built_unless_they_fit_and_load(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "setup.py").write_text("sources")
    (tmp_path / "csrc").mkdir()
    fits, fails = subprocess.CompletedProcess([], 0), subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(gpu.subprocess, "run", lambda *arguments, **options: fits)
    assert not gpu.is_built((9, 0))
    here = gpu.sources_hash(tmp_path)
    write_library(tmp_path, "cpu", sources=here)
    write_library(tmp_path, "cuda", sources=here, cuda="13.0", cuda_archs="sm_90")
    assert gpu.is_built((9, 0)) and not gpu.is_built((8, 0))
    monkeypatch.setattr(gpu.subprocess, "run", lambda *arguments, **options: fails)
    assert not gpu.is_built((9, 0))
    monkeypatch.setattr(gpu.subprocess, "run", lambda *arguments, **options: fits)
    (tmp_path / "setup.py").write_text("other sources")
    assert not gpu.is_built((9, 0))
    for built, word in ((False, "setup.py"), (True, "-c")):
        assert gpu.steps(None, tmp_path, pictures=False, built=built)[0].command[1] == word


@pytest.mark.parametrize("code, status", [("print('fine')", 0), ("print('bad'); raise SystemExit(1)", 1)])
def test_the_summary_comes_last_and_everything_is_logged(code, status, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu, "steps", lambda sanitizer, output, pictures, built: [python("only", code)])
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.chdir(tmp_path)
    assert gpu.main() == status
    printed = capfd.readouterr().out
    assert printed == (tmp_path / "out/gpu.log").read_text()
    summary = printed[printed.index("== summary: A GPU, PyTorch") :].splitlines()
    assert summary[1].split()[:2] == ["only", steps.FAILED if status else steps.OK]
    assert summary[-1].endswith(f"records in {tmp_path / 'out'}, everything printed in {tmp_path / 'out/gpu.log'}")


def test_without_a_gpu_it_says_so():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, gpu.__file__], env=environment, capture_output=True, text=True, cwd="/")
    assert run.returncode == 1
    assert run.stdout.startswith("make gpu: PyTorch sees no GPU here") and run.stdout.count("\n") == 1
