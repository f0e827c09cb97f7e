"""The order, the limits and the summary of `make gpu`, with commands that need no GPU."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_package, gpu_plan, ledger, steps
from benchmarks.gpu_plan import Place
from benchmarks.steps import FAILED, NOT_REACHED, OK, OUT_OF_TIME, REFUSED, SKIPPED, Step


def python(name: str, code: str, budget: float = 20.0, **options) -> Step:
    return Step(name, [sys.executable, "-c", code], budget, **options)


def run_all(planned: list[Step], seconds: float, log: io.StringIO | None = None) -> list[steps.Result]:
    return steps.run_all(planned, time.monotonic() + seconds, log)


def test_good_bad_and_skipped_steps(capfd):
    log = io.StringIO()
    results = run_all(
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
    assert [r.detail for r in results[:4]] == [
        "two\nthree",
        "why\nended with exit status 3",
        "not run: it needs fails",
        "no such tool",
    ]
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
    (result,) = run_all([python("hangs", code, 4.0), python("waits", "", 47.0)], 55.0)[:1]
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
        (result,) = run_all([python("saves", code)], 25.0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (result.status, result.detail) == (OUT_OF_TIME, "up\nsaved")


def test_the_limit_of_all_steps_cuts_the_last_ones():
    limit = steps.GRACE_SECONDS + 2.0
    start = time.monotonic()
    results = run_all([python("long", "import time; time.sleep(60)", 50.0), python("late", "print('never')")], limit)
    assert time.monotonic() - start < limit + 3 * steps.GRACE_SECONDS
    assert [r.status for r in results] == [OUT_OF_TIME, NOT_REACHED]
    assert results[1].detail == "no time left"


def test_a_step_has_its_budget_and_what_earlier_ones_left():
    """Up to twice its own. What one takes beyond its own is missing at the end."""
    print_limit = [sys.executable, "-c", "import sys; print(sys.argv[1])", "{limit}"]
    planned = [Step("0", print_limit, 20.0), Step("1", print_limit, 60.0), Step("2", print_limit, 20.0)]
    totals = (seconds + steps.GRACE_SECONDS for seconds in (100.0, 60.0))
    of_100, of_60 = ([float(r.detail) for r in run_all(planned, total)] for total in totals)
    assert of_100[0] == 20 and 70 <= of_100[1] <= 80 and of_100[2] == 40
    assert of_60[0] == 20 and 45 <= of_60[1] <= 60 and of_60[2] == 40


def test_what_needs_a_tool_that_is_refused_here_is_skipped():
    planned = [
        python("works", "raise SystemExit(1)", probe=True),
        python("fails", "raise SystemExit(1)"),
        python("a", "pass", needs=("works",)),
        python("b", "pass", needs=("works", "fails")),
        python("c", "pass", needs=("a",)),
    ]
    results = run_all(planned, 100.0)
    assert [r.status for r in results] == [REFUSED, FAILED, SKIPPED, FAILED, SKIPPED]
    assert [r.good for r in results] == [True, False, True, False, True]
    assert results[3].detail == "not run: it needs works, fails"


def test_the_time_of_what_is_refused_goes_to_what_follows():
    print_limit = [sys.executable, "-c", "import sys; print(sys.argv[1])", "{limit}"]
    probe = python("works", "raise SystemExit(1)", 5.0, probe=True)
    planned = [probe, Step("next", print_limit, 45.0), python("long", "", 45.0, needs=("works",))]
    assert float(run_all(planned, 100.0)[1].detail) >= 75


def test_a_command_that_crashes_is_run_again(tmp_path):
    """Not one that ends with status 0 or 1; and no more often than it may."""
    count = tmp_path / "count"
    code = f"""
import os, signal
from pathlib import Path
count = Path({str(count)!r})
times = len(count.read_text()) if count.exists() else 0
count.write_text("." * (times + 1))
print(times)
if times == 0:
    raise SystemExit(75)
if times < LAST:
    os.kill(os.getpid(), signal.SIGSEGV)
raise SystemExit(1)
"""
    for last, tries, runs, detail in ((2, 5, 3, "2"), (9, 3, 3, "2\nended by SIGSEGV")):
        count.unlink(missing_ok=True)
        (result,) = run_all([python("crashes", code.replace("LAST", str(last)), tries=tries)], 60.0)
        assert (result.status, result.detail, len(count.read_text())) == (FAILED, detail, runs)


def test_results_are_told_after_each_step():
    told = []
    planned = [python("a", "print(1)"), python("b", "print(2)")]
    steps.run_all(planned, time.monotonic() + 60, after_each=lambda results: told.append([r.name for r in results]))
    assert told == [["a"], ["a", "b"]]


def place(folder: Path, **options) -> Place:
    given = dict(built=True, sanitizer="/opt/compute-sanitizer", ncu="/opt/ncu")
    return Place(output=folder, work=folder, record=folder / "record.json", **{**given, **options})


def test_the_plan_of_correctness(tmp_path):
    planned = gpu_plan.correctness(place(tmp_path))
    assert sum(step.budget for step in planned) <= gpu_plan.LIMITS["correctness"] == 260
    by_name = {step.name: step for step in planned}
    tests = by_name["tests of kernels"].command
    assert tests[1:5] == ["-m", "pytest", "-v", "-m"] and "cuda and not slow and not compiles" in tests
    assert "tests/ops/test_focal_loss.py" in tests and "tests/benchmarks/test_report.py" not in tests
    for tool, filtered in (("memcheck", True), ("initcheck", False)):
        command = by_name[tool].command
        assert command[:3] == ["/opt/compute-sanitizer", "--tool", tool]
        assert command[3:7] == ["--error-exitcode", "86", "--report-api-errors", "no"]
        assert ("kernel_substring=_ZN2ef" in command) == filtered
        assert by_name[tool].environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    without = {step.name: step for step in gpu_plan.correctness(place(tmp_path, sanitizer=None, ncu=None))}
    assert without["compute-sanitizer works"].skip == "compute-sanitizer is not installed"
    assert without["ncu works"].skip == "ncu is not installed"


def test_the_plan_of_speed(tmp_path):
    planned = gpu_plan.speed(place(tmp_path), {})
    assert sum(step.budget for step in planned) <= gpu_plan.LIMITS["speed"] == 360
    assert [step.name for step in planned if not step.probe] == [
        "D0's step",
        "ops",
        "RetinaNet's step",
        "racecheck",
        "tests of huge tensors",
        "variants",
        "ncu",
    ]
    by_name = {step.name: step for step in planned}
    assert by_name["ops"].command[3:13] == list(gpu_plan.OPS)
    assert all(by_name[name].command[-2:] == ["--end-within", "{limit}"] for name in ("D0's step", "ops"))
    assert by_name["variants"].skip == "no .gpu/variants for this GPU is here: make gpu-package builds it"
    with_variants = {step.name: step for step in gpu_plan.speed(place(tmp_path, variants=tmp_path / "program"), {})}
    assert with_variants["variants"].skip is None
    assert with_variants["variants"].command == [str(tmp_path / "program"), str(tmp_path / "variants.jsonl")]
    again = gpu_plan.speed(place(tmp_path), {"tests of kernels": ["a::b", "a::c"], "initcheck": [], "ncu works": []})
    assert [step.name for step in again[:3]] == ["tests again", "ncu works", "initcheck"]
    assert (tmp_path / "again.txt").read_text() == "a::b\na::c\n"
    assert [step.name for step in again].count("ncu works") == 1


def test_all_steps_need_what_is_built_first(tmp_path):
    for planned in (
        gpu_plan.correctness(place(tmp_path, built=False)),
        gpu_plan.speed(place(tmp_path, built=False), {}),
    ):
        assert planned[0].name == "build" and planned[0].budget == 180
        assert planned[0].environment["EFFDET_FAST_CUDA"] == "1" and "--force" in planned[0].command
        assert all("build" in step.needs for step in planned[1:] if not step.probe)


def test_a_ledger_that_ends_in_the_middle_of_a_line(tmp_path):
    lines = [
        ("a", "collected"),
        ("b", "collected"),
        ("c", "collected"),
        ("d", "collected"),
        ("e", "collected"),
        ("a", "begun"),
        ("a", "passed"),
        ("b", "begun"),
        ("c", "begun"),
        ("c", "failed"),
        ("c", "passed"),
        ("e", "skipped"),
    ]
    text = "".join(json.dumps({"test": t, "state": s, "message": f"{t}!"}) + "\n" for t, s in lines)
    (tmp_path / "ledger").write_text(text + '{"test": "d", "st')
    tests = ledger.read(tmp_path / "ledger")
    assert tests == ledger.Tests(1, {"e": "e!"}, {"c": "c!"}, ["b"], ["d"]) and tests.to_repeat == ["c", "b", "d"]
    assert ledger.read(tmp_path / "none") == ledger.Tests()


def test_what_was_not_done():
    def step(status: str, **tests) -> dict:
        return {"status": status, **({"tests": asdict(ledger.Tests(**tests))} if tests else {})}

    done = {"a": step("ok"), "b": step("refused"), "c": step("skipped"), "d": step("ok", passed=3)}
    left = {"e": step("FAILED"), "f": step("FAILED", failed={"x": ""}, running=["y"]), "g": step("NOT REACHED")}
    assert gpu.not_done({"steps": {**done, **left}}) == {"e": [], "f": ["x", "y"], "g": []}


def write_library(folder: Path, device: str, **info: str) -> None:
    folder.mkdir(exist_ok=True)
    text = f"effdet_fast build info: {json.dumps(info)}"
    (folder / f"kernels_{device}.so").write_bytes(b"\0" + text.encode() + b"\0")


def test_libraries_are_built_unless_they_fit_and_load(tmp_path, monkeypatch):
    """Those in place, or else those that were carried."""
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "PACKAGE", tmp_path / ".gpu")
    (tmp_path / "setup.py").write_text("sources")
    (tmp_path / "csrc").mkdir()
    fits, fails = subprocess.CompletedProcess([], 0), subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(gpu.subprocess, "run", lambda *arguments, **options: fits)
    assert not gpu.take_libraries((9, 0))
    here = gpu.sources_hash(tmp_path)
    write_library(tmp_path / ".gpu", "cpu", sources=here)
    write_library(tmp_path / ".gpu", "cuda", sources=here, cuda="13.0", cuda_archs="sm_90")
    in_place = tmp_path / "effdet_fast"
    in_place.mkdir()
    assert not gpu.take_libraries((8, 0)) and not list(in_place.iterdir())
    assert gpu.take_libraries((9, 0)) and len(list(in_place.iterdir())) == 2
    write_library(in_place, "cuda", sources=here, cuda="13.0", cuda_archs="sm_80, sm_90")
    before = (in_place / "kernels_cuda.so").read_bytes()
    assert gpu.take_libraries((9, 0)) and (in_place / "kernels_cuda.so").read_bytes() == before
    monkeypatch.setattr(gpu.subprocess, "run", lambda *arguments, **options: fails)
    assert not gpu.take_libraries((9, 0))
    monkeypatch.setattr(gpu.subprocess, "run", lambda *arguments, **options: fits)
    (tmp_path / "setup.py").write_text("other sources")
    assert not gpu.take_libraries((9, 0))


def test_variants_are_taken_where_they_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PACKAGE", tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    assert gpu.take_variants((9, 0), work) is None
    write_library(tmp_path, "cuda", cuda_archs="sm_90")
    carried = (tmp_path / "kernels_cuda.so").rename(tmp_path / "variants")
    carried.chmod(0o644)
    assert gpu.take_variants((8, 0), work) is None and not list(work.iterdir())
    program = gpu.take_variants((9, 0), work)
    assert program is not None and program.parent == work and os.access(program, os.X_OK)
    assert program.read_bytes() == carried.read_bytes()


def test_the_package_says_how_to_call(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_package, "PACKAGE", tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    assert gpu_package.main() == 1 and "not built: kernels_cpu.so, kernels_cuda.so" in capsys.readouterr().err
    for device in ("cpu", "cuda"):
        write_library(tmp_path, device, sources="x", cuda_archs="sm_90")
    assert gpu_package.main() == 0
    calls = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [call["command"] for call in calls] == [f"python3 benchmarks/gpu.py {p}" for p in ("correctness", "speed")]
    # What a machine's start takes too, of 15 minutes in all.
    assert sum(call["timeout_s"] for call in calls) + 2 * 120 <= 15 * 60
    assert (tmp_path / "commit").read_text().strip()


def test_without_a_gpu_it_says_so():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, gpu.__file__], env=environment, capture_output=True, text=True, cwd="/")
    assert run.returncode == 1
    assert run.stdout.startswith("make gpu: PyTorch sees no GPU here") and run.stdout.count("\n") == 1
