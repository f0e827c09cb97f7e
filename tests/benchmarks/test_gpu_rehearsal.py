"""`benchmarks/gpu.py` as it is called on a machine with a GPU, on one that is made up: see tests/fake_gpu.

The tree is as it arrives there: no .git, no effdet, no pycocotools. `make rehearsal` has that machine's PyTorch too.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import OPS
from benchmarks.__main__ import CUT_SHORT
from benchmarks.gpu import LIBRARIES
from benchmarks.gpu_plan import CORRECTNESS, LIMITS, SPEED, files_with_cuda_tests
from benchmarks.records import from_json
from effdet_fast import _libraries
from effdet_fast._build_info import read_build_info

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("EFFDET_FAST_REHEARSAL_PYTHON", sys.executable)
FOLDERS = ("benchmarks", "csrc", "effdet_fast", "tests/emulation", "tests/fake_gpu")
FILES = ("setup.py", "pyproject.toml", "README.md", "tests/__init__.py", "tests/conftest.py")
LOST = "RuntimeError: CUDA error: an illegal memory access was encountered"
TESTS = "tests/ops/test_made_up.py"
CODE = """
import pytest
import torch

from effdet_fast import ops

pytestmark = pytest.mark.cuda


def check():
    logits, labels = torch.randn(4, 5, device="cuda"), torch.tensor([0, 1, -1, -2], device="cuda")
    assert ops.sigmoid_focal_loss(logits, labels).shape == logits.shape


@pytest.mark.parametrize("case", ["fails", "dies", "hangs", "loses", *map(str, range(20))])
def test_kernel(case):
    check()


@pytest.mark.compiles
def test_compiled():
    check()


@pytest.mark.slow
def test_huge():
    check()
"""

pytestmark = pytest.mark.skipif("cuda" in _libraries.missing, reason="the CUDA kernels are not built")


@pytest.fixture
def machine(tmp_path):
    """A tree with the libraries carried in .gpu, and a way to call the script in it."""
    tree, out = tmp_path / "tree", tmp_path / "out"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, tree / name)
    (tree / TESTS).parent.mkdir()
    (tree / TESTS).write_text(CODE)
    (tree / ".gpu").mkdir()
    for name in LIBRARIES:
        shutil.copy(ROOT / "effdet_fast" / name, tree / ".gpu" / name)
    info = read_build_info(tree / ".gpu" / LIBRARIES[1])
    assert info is not None
    arch = re.match(r"sm_(\d+)(\d)", info["cuda_archs"])
    assert arch is not None
    fake = tree / "tests/fake_gpu"
    environment = {
        **os.environ,
        "FAKE_GPU_CAPABILITY": f"{arch[1]}.{arch[2]}",
        "FAKE_GPU_HIDES": "effdet,pycocotools",
        "OMP_NUM_THREADS": "1",
        "OUT": str(out),
        "PATH": os.pathsep.join([str(fake / "bin"), os.environ["PATH"]]),
        "PYTHONPATH": str(fake),
        "PYTEST_ADDOPTS": "-p fake_faults",
    }
    for name in [name for name in environment if name.startswith(("PYTEST_XDIST", "COV_"))]:
        del environment[name]

    def call(part: str, seconds: float, faults: str = "") -> SimpleNamespace:
        out.mkdir(exist_ok=True)
        for file in out.iterdir():
            file.unlink()
        run = subprocess.run(
            [PYTHON, "benchmarks/gpu.py", part, "--seconds", str(seconds)],
            cwd=tree,
            env={**environment, "FAKE_GPU_FAULTS": faults},
            capture_output=True,
            text=True,
        )
        files = sorted(file.name for file in out.iterdir())
        assert f"{part}.json" in files, run.stdout + run.stderr
        left = json.loads((out / f"{part}.json").read_text())
        steps = {name: step["status"] for name, step in left["steps"].items()}
        return SimpleNamespace(code=run.returncode, files=files, left=left, steps=steps, out=out, printed=run.stdout)

    return SimpleNamespace(call=call, tree=tree)


def kernel(case: str) -> str:
    return f"{TESTS}::test_kernel[{case}]"


def test_both_parts(machine):
    """Each step's faults cost nothing that was done, are named, and the second part repeats their tests first."""
    seconds = LIMITS[CORRECTNESS]
    faults = "kernel[fails]:fails,kernel[dies]:dies,kernel[hangs]:hangs,kernel[loses]:lost,ncu:refuses"
    first = machine.call("correctness", seconds, faults)
    assert list(first.steps.items()) == [
        ("versions and self-tests", "ok"),
        ("compute-sanitizer works", "ok"),
        ("ncu works", "refused"),
        ("tests of kernels", "FAILED"),
        ("memcheck", "ok"),
        ("initcheck", "ok"),
        ("tests of torch.compile", "ok"),
    ]
    assert first.code == 1 and first.left["seconds"] < seconds and first.left["device"]["name"] == "Fake GPU"
    assert first.files == ["correctness.json", "correctness.log", "tests-of-kernels.xml", "tests-of-torch-compile.xml"]
    tests = first.left["steps"]["tests of kernels"]["tests"]
    assert set(tests["failed"]) == set(map(kernel, ("fails", "dies", "hangs", "loses")))
    assert tests["failed"][kernel("fails")] == f"RuntimeError: {kernel('fails')} fails"
    assert tests["failed"][kernel("loses")] == LOST
    for case in ("dies", "hangs"):
        assert "crashed while running" in tests["failed"][kernel(case)]
    assert tests["passed"] == 20 and tests["running"] == tests["not_reached"] == []
    assert (first.out / "correctness.log").read_text() in first.printed
    assert f"tests of kernels: failed: {kernel('dies')}" in first.printed

    shutil.copy(first.out / "correctness.json", machine.tree / ".gpu")
    seconds = LIMITS[SPEED]
    once = "/nms/second/torch.float32:dies,/soft_nms/second/torch.float32:lost,/fusion/second/torch.float32:fails"
    second = machine.call("speed", seconds, f"{once},/training_step/retinanet:hangs,compute-sanitizer:refuses")
    assert list(second.steps.items()) == [
        ("tests again", "ok"),
        ("D0's step", "ok"),
        ("ops", "FAILED"),
        ("RetinaNet's step", "OUT OF TIME"),
        ("compute-sanitizer works", "refused"),
        ("ncu works", "ok"),
        ("racecheck", "skipped"),
        ("tests of huge tensors", "ok"),
        ("variants", "skipped"),
        ("ncu", "ok"),
    ]
    assert second.code == 1 and second.left["seconds"] < seconds
    assert second.left["steps"]["tests again"]["tests"]["passed"] == 4
    (record,) = (file for file in second.files if file.startswith("fake-gpu-20"))
    others = ["profile.txt", "speed.json", "speed.log", "tests-again.xml", "tests-of-huge-tensors.xml"]
    assert sorted(second.files) == sorted([record, *others])
    content = from_json((second.out / record).read_text())
    missing = {
        "nms, second, float32, contiguous": CUT_SHORT,
        "soft_nms, second, float32, contiguous": f"failed: {LOST}",
        "fusion, second, float32, contiguous": "failed: RuntimeError: /fusion/second/torch.float32 fails",
        "training_step, retinanet, bfloat16, contiguous": CUT_SHORT,
    }
    assert content.missing == second.left["benchmark"]["missing"] == missing
    d0, *of_ops = content.rows
    assert set(d0.timings) == {"effdet_fast", "effdet", "effdet_fast on effdet", "effdet_fast, graphed"}
    measured = {row.name for row in of_ops if row.ours}
    assert len(measured) == len(OPS) * 4 - 3  # two cases, two dtypes
    compiled = [row.op for row in of_ops if "torch.compile" in row.timings]
    assert compiled == list(OPS)  # the first case of each


@pytest.mark.slow
def test_what_is_not_reached_is_named(machine):
    """In time for nothing but the first steps, and with a step that does not end when it is asked to."""
    run = machine.call("speed", 25, "training_step/efficientdet:hangs")
    assert run.left["seconds"] < 25 and run.code == 1
    assert run.steps["D0's step"] == "OUT OF TIME" and run.steps["ncu"] == "NOT REACHED"
    assert "training_step, efficientdet, bfloat16, contiguous: the process ended" in run.printed


@pytest.mark.slow
def test_libraries_that_do_not_fit_are_built_there(machine):
    for file in (machine.tree / ".gpu").glob("*.so"):
        file.unlink()
    run = machine.call("correctness", 900)
    assert run.steps["build"] == "ok" and set(run.steps.values()) == {"ok"} and run.code == 0


def test_all_cuda_tests_can_be_collected_there():
    """Without the packages that such a machine does not have."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests/fake_gpu"), "FAKE_GPU_HIDES": "effdet,pycocotools"}
    command = [PYTHON, "-m", "pytest", "-q", "--collect-only", "-m", "cuda", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, *files_with_cuda_tests()], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout
