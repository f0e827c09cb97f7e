"""Building and importing the package: what the build says, and what happens without a compiled extension."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from tests import wheels

ROOT = Path(__file__).resolve().parents[1]


def setup_py(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)


def fake_toolkit(folder: Path, release: str) -> Path:
    (folder / "bin").mkdir(parents=True)
    (folder / "include").mkdir()
    (folder / "include/cuda_runtime.h").touch()
    nvcc = folder / "bin/nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    nvcc.chmod(0o755)
    return folder


def test_another_cuda_major_is_named_with_both_versions(tmp_path):
    if torch.version.cuda is None:
        pytest.skip("torch is a CPU build")
    home = fake_toolkit(tmp_path / "cuda-11", "11.8")
    done = setup_py("--name", CUDA_HOME=str(home), EFFDET_FAST_CUDA="1")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"nvcc is CUDA 11.8 ({home}) but torch was built with CUDA {torch.version.cuda}" in done.stderr
    done = setup_py("--name", CUDA_HOME=str(home), EFFDET_FAST_CUDA="auto")
    assert done.returncode == 0 and "building without CUDA: nvcc is CUDA 11.8" in done.stdout


def test_a_wrong_switch_is_named():
    done = setup_py("--name", EFFDET_FAST_CUDA="yes")
    assert done.returncode == 1 and "EFFDET_FAST_CUDA must be auto, 0 or 1, got yes" in done.stderr


def test_nvcc_may_be_a_wrapper_script(tmp_path):
    """The toolkit is asked of nvcc itself: the wrapper's own folder has no headers."""
    if torch.version.cuda is None:
        pytest.skip("torch is a CPU build")
    toolkit = fake_toolkit(tmp_path / "toolkit", torch.version.cuda)
    (tmp_path / "bin").mkdir()
    wrapper = tmp_path / "bin/nvcc"
    wrapper.write_text(f"#!/bin/sh\necho '#$ TOP={toolkit}/bin/..' >&2\n")
    wrapper.chmod(0o755)
    program = "import toolkit; print(toolkit.find_toolkit()[0])"
    environment = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH")}
    environment |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "csrc")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(toolkit), done.stderr


def test_without_the_extension_the_reference_runs_and_warns_once(tmp_path):
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(tmp_path)]
    # A copy, so that the build leaves no trace in the source folder.
    source = tmp_path / "source"
    tracked = ["setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "effdet_fast", "csrc"]
    source.mkdir()
    subprocess.run(["cp", "-r", *(str(ROOT / name) for name in tracked), str(source)], check=True)
    for library in (source / "effdet_fast").glob("*.so"):
        library.unlink()
    done = subprocess.run(
        [*pip, str(source)],
        env=os.environ | {"EFFDET_FAST_EXTENSION": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl") and wheels.main([str(wheel)]) == 0
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    program = (
        # An editable install of this package would lend its extension to the copy.
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')]\n"
        "import warnings, torch\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import effdet_fast.ops as ops, effdet_fast.nn, effdet_fast.models\n"
        "ours = [w for w in caught if 'compiled kernels' in str(w.message)]\n"
        "assert len(ours) == 1 and 'doctor' in str(ours[0].message), caught\n"
        "x = torch.randn(3, 4, requires_grad=True)\n"
        "ops.sigmoid_focal_loss(x, torch.tensor([0, -1, 3]), reduction='sum').backward()\n"
        "print(ops.__file__, x.grad.shape)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and str(tmp_path / "installed") in done.stdout, done.stdout + done.stderr


def test_only_coco_metrics_need_pycocotools():
    """A training step, captured or not, and its tests on a GPU run without it and without effdet."""
    program = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('pycocotools', 'effdet'):\n"
        "            raise ModuleNotFoundError(f'no {name} here', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "import effdet_fast.cli.main, effdet_fast.detector, effdet_fast.export, effdet_fast.acceleration\n"
        "import tests.training.test_graphed_step_cuda, tests.training.test_trainer_cuda\n"
        "from effdet_fast.evaluation import coco_metrics\n"
        "try:\n"
        "    coco_metrics(None, [])\n"
        "except ModuleNotFoundError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("no pycocotools"), done.stdout + done.stderr


def test_each_step_of_the_workflow_is_a_make_target():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    commands = re.findall(r"run: (.*)", workflow)
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert commands[-1] == "make test"
    assert all(command.removeprefix("make ") in targets for command in commands)
