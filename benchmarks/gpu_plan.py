"""What `make gpu` does: the steps of its two parts, each with the seconds set aside for it."""

import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import OPS
from benchmarks.steps import Step

ROOT = Path(__file__).resolve().parents[1]
CORRECTNESS, SPEED = "correctness", "speed"
LIMITS = {CORRECTNESS: 260.0, SPEED: 360.0}  # seconds of a part, from the beginning of its process
WORKERS = min(6, os.cpu_count() or 1)
HUGE_WORKERS = min(3, WORKERS)  # each test of them takes up to 15 GB
KERNELS, COMPILED, HUGE = "tests of kernels", "tests of torch.compile", "tests of huge tensors"
# All kernels of this package are in the namespace ef. PyTorch's own calls that fail harmlessly are no errors of ours.
OURS_BY_NAME = ["--kernel-name", "kernel_substring=_ZN2ef"]
SANITIZER_OPTIONS = ["--error-exitcode", "86", "--report-api-errors", "no"]
NCU_OPTIONS = ["--clock-control", "none"]
ONE_KERNEL = "import torch; print(int(torch.ones(8, device='cuda').sum()))"


@dataclass(frozen=True)
class Place:
    """Where it runs, and where its files go: `output` is what is kept, `work` is scratch."""

    output: Path
    work: Path
    record: Path
    built: bool
    sanitizer: str | None
    ncu: str | None
    site: Path | None = None  # packages that were carried here
    variants: Path | None = None  # the program of benchmarks/variants, if one for this GPU was carried here


def correctness(place: Place) -> list[Step]:
    return behind_build(place, steps_of_correctness(place))


def speed(place: Place, before: dict[str, list[str]]) -> list[Step]:
    """`before` has the steps of the first part that were not done, and of those that run tests the tests to repeat."""
    of_model = ("training_step", "--dtype", "bfloat16", "--seconds", "4", "--case")

    def peers(name: str) -> tuple[str, ...]:
        return "--peers", name, f"effdet_fast on {name}", "effdet_fast, graphed"

    steps = [
        *again(place, before),
        measured(place, "D0's step", 70, *of_model, "efficientdet", *peers("effdet")),
        measured(place, "ops", 80, *OPS, "--compiled", "first", "--seconds", "0.3"),
        measured(place, "RetinaNet's step", 40, *of_model, "retinanet", *peers("torchvision")),
        *(probe for probe in probes(place) if probe.name not in before),
        sanitized(place, "racecheck", 35, OURS_BY_NAME),
        tests(place, HUGE, "cuda and slow", 45, workers=HUGE_WORKERS),
        variants(place, 25),
        profiled(place, 30),
    ]
    return behind_build(place, steps)


def behind_build(place: Place, steps: list[Step]) -> list[Step]:
    """Where the libraries that are there do not do. The limits of the parts have no room for it: the last steps pay."""
    if place.built:
        return steps
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--force"]
    build = Step("build", command, 180, {**common(place), "EFFDET_FAST_CUDA": "1"}, output_lines=1)
    return [build, *(step if step.probe else replace(step, needs=(build.name, *step.needs)) for step in steps)]


def steps_of_correctness(place: Place) -> list[Step]:
    doctor = [sys.executable, "-m", "effdet_fast", "doctor"]
    return [
        Step("versions and self-tests", doctor, 25, common(place), output_lines=1),
        *probes(place),
        tests(place, KERNELS, "cuda and not slow and not compiles", 105),
        sanitized(place, "memcheck", 35, OURS_BY_NAME),
        # Not by name: it would not know what other kernels have written.
        sanitized(place, "initcheck", 35, []),
        tests(place, COMPILED, "cuda and not slow and compiles", 40),
    ]


def again(place: Place, before: dict[str, list[str]]) -> list[Step]:
    names = sorted({test for tests_of_step in before.values() for test in tests_of_step})
    only = place.work / "again.txt"
    only.write_text("".join(f"{name}\n" for name in names))
    repeated = [tests(place, "tests again", "cuda", 45, "--only", str(only))] if names else []
    return repeated + [step for step in steps_of_correctness(place) if step.name in before and not before[step.name]]


def tests(place: Place, name: str, marks: str, budget: float, *options: str, workers: int = WORKERS) -> Step:
    """A process that hangs in a call, or whose GPU does not answer any more, ends, and another goes on with the next test."""
    file = file_name(name)
    command = [sys.executable, "-m", "pytest", "-v", "-m", marks, "-n", str(workers), "--max-worker-restart", "40"]
    command += ["--timeout", "60", "--timeout-method", "thread", "-p", "no:cacheprovider", "-p", "benchmarks.ledger"]
    command += ["--ledger", str(place.work / f"{file}.jsonl"), "--junit-xml", str(place.output / f"{file}.xml")]
    command += ["--continue-on-collection-errors", *options, *files_with_cuda_tests()]
    threads = max(1, (os.cpu_count() or 1) // workers)  # more would wait for each other
    environment = {**common(place), "OMP_NUM_THREADS": str(threads)}
    return Step(name, command, budget, environment, output_lines=12)


def file_name(step: str) -> str:
    return re.sub(r"\W+", "-", step)


def probes(place: Place) -> list[Step]:
    """Both tools refuse some machines."""
    tools = {"compute-sanitizer": (place.sanitizer, SANITIZER_OPTIONS), "ncu": (place.ncu, NCU_OPTIONS)}
    return [
        Step(
            f"{name} works",
            [path or name, *options, sys.executable, "-c", ONE_KERNEL],
            10,
            common(place),
            skip=None if path else f"{name} is not installed",
            probe=True,
        )
        for name, (path, options) in tools.items()
    ]


def sanitized(place: Place, tool: str, budget: float, which: list[str]) -> Step:
    command = [place.sanitizer or "", "--tool", tool, *SANITIZER_OPTIONS, *which]
    command += [sys.executable, "-m", "benchmarks.smoke"]
    environment = {**common(place), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Step(tool, command, budget, environment, needs=("compute-sanitizer works",))


def profiled(place: Place, budget: float) -> Step:
    by_name = ["--kernel-name-base", "demangled", "--kernel-name", r"regex:^(void )?ef::"]
    command = [place.ncu or "", *by_name, *NCU_OPTIONS, "--set", "detailed"]
    command += ["--log-file", str(place.output / "profile.txt"), sys.executable, "-m", "benchmarks.single_pass"]
    return Step("ncu", command, budget, common(place), needs=("ncu works",))


def variants(place: Place, budget: float) -> Step:
    command = [str(place.variants), str(place.output / "variants.jsonl")]
    why_not = None if place.variants else "no .gpu/variants for this GPU is here: make gpu-package builds it"
    return Step("variants", command, budget, common(place), skip=why_not)


def measured(place: Place, name: str, budget: float, *options: str) -> Step:
    """All into one record. A fault leaves its process without a GPU; the next one goes on behind the case that had it."""
    command = [sys.executable, "-m", "benchmarks", *options, "--device", "cuda", "--record", str(place.record)]
    command += ["--no-pictures", "--end-within", "{limit}"]
    return Step(name, command, budget, common(place), tries=10)


def common(place: Place) -> dict[str, str]:
    folders = [str(ROOT), str(place.site) if place.site else None, os.environ.get("PYTHONPATH")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, folders)), "PYTHONUNBUFFERED": "1"}


def files_with_cuda_tests() -> list[str]:
    """Only those, since other tests import packages that a machine for this run may not have."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    has_some = re.compile(r"mark\.cuda|def test_\w+\([^)]*\b(native_)?(backend|device)\b")
    return [str(file.relative_to(ROOT)) for file in files if has_some.search(file.read_text())]
