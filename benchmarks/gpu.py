"""`make gpu`: builds for the visible GPU, tests, looks for memory errors and races, measures; at most 9 minutes.

Libraries that were built elsewhere from these sources, for this GPU, are used as they are. Records go to the folder in OUT, else
to benchmarks/results/. Needs PyTorch with CUDA and pytest; to build, nvcc and ninja.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # also runs as a script

from benchmarks import BENCHMARKS  # noqa: E402
from benchmarks.steps import Step, run_all, summary  # noqa: E402
from effdet_fast._build_info import covers, read_build_info, sources_hash  # noqa: E402

LIMIT = 530.0  # seconds for everything, below 9 minutes
# PyTorch's own calls that fail harmlessly are no errors of ours.
SANITIZER_OPTIONS = ["--error-exitcode", "86", "--report-api-errors", "no"]
BUILD, TESTS, SANITIZER, BENCHMARK = 200.0, 130.0, 40.0, 120.0


def is_built(capability: tuple[int, int]) -> bool:
    """Whether both libraries are there, built from these sources and, for CUDA, for this GPU, and load."""
    cpu, cuda = (read_build_info(ROOT / f"effdet_fast/kernels_{device}.so") for device in ("cpu", "cuda"))
    if cpu is None or cuda is None or {cpu["sources"], cuda["sources"]} != {sources_hash(ROOT)}:
        return False
    load = "from effdet_fast import _libraries; raise SystemExit(len(_libraries.missing))"
    return (
        covers(cuda["cuda_archs"], capability)
        and subprocess.run([sys.executable, "-c", load], cwd=ROOT).returncode == 0
    )


def steps(sanitizer: str | None, output: Path, pictures: bool, built: bool = False) -> list[Step]:
    python = sys.executable
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    common = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    carried = "print('not built: the libraries that are there fit the sources and the GPU')"
    build_command = [python, "-c", carried] if built else [python, "setup.py", "build_ext", "--inplace"]
    build = Step("build", build_command, BUILD, {**common, "EFFDET_FAST_CUDA": "1"}, output_lines=1)
    options = ["-q", "-m", "cuda and not slow", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    tests = Step(
        "tests",
        [python, "-m", "pytest", *options, *files_with_cuda_tests()],
        TESTS,
        common,
        needs=(build.name,),
        output_lines=12,
    )
    smoke = [python, "-m", "benchmarks.smoke"]
    checks = [
        Step(
            tool,
            [sanitizer or "compute-sanitizer", "--tool", tool, *SANITIZER_OPTIONS, *smoke],
            SANITIZER,
            {**common, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            needs=(build.name,),
            skip=None if sanitizer else "compute-sanitizer is not installed",
        )
        for tool in ("memcheck", "racecheck", "initcheck")
    ]
    measure = ["--device", "cuda", "--output", str(output), "--seconds", "0.3", "--end-within", "{limit}"]
    measure += [] if pictures else ["--no-pictures"]
    # A process per op: a kernel that faults leaves its process without a GPU, but not the other ops'.
    measurements = [
        Step(
            f"benchmark {op}",
            [python, "-m", "benchmarks", op, *measure],
            BENCHMARK,
            common,
            needs=(build.name,),
            share=True,
        )
        for op in BENCHMARKS
    ]
    return [build, tests, *checks, *measurements]


def files_with_cuda_tests() -> list[str]:
    """Only those, since other tests import packages that a machine for this run may not have."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    words = ("mark.cuda", "backend: Backend", "backend)", "backend,")
    return [str(f.relative_to(ROOT)) for f in files if any(word in f.read_text() for word in words)]


def main() -> int:
    import torch

    if not torch.cuda.is_available():
        print("make gpu: PyTorch sees no GPU here; on a machine with one this builds, tests, checks and measures.")
        return 1
    os.chdir(ROOT)
    out = os.environ.get("OUT")
    output = Path(out) if out else ROOT / "benchmarks/results"
    output.mkdir(parents=True, exist_ok=True)
    log_folder = output if out else ROOT / "build"
    log_folder.mkdir(exist_ok=True)
    start = time.monotonic()
    device, built = torch.cuda.get_device_name(), is_built(torch.cuda.get_device_capability())
    with open(log_folder / "gpu.log", "w") as log:
        results = run_all(steps(shutil.which("compute-sanitizer"), output, not out, built), LIMIT, log)
        text = f"== summary: {device}, PyTorch {torch.__version__}\n{summary(results)}"
        text += f"\n{time.monotonic() - start:.0f} s; records in {output}, everything printed in {log.name}"
        log.write(text + "\n")
    print(text)
    return 0 if all(result.good for result in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
