"""`make gpu`: what only a GPU can tell. Two parts, which may run on two machines: correctness, then speed.

python benchmarks/gpu.py [correctness | speed]

Everything goes to the folder in OUT, else to a new one below build/gpu. docs/gpu.md says what it needs, does and leaves.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # also runs as a script

from benchmarks import START, gpu_plan, ledger, records  # noqa: E402
from benchmarks.gpu_plan import CORRECTNESS, LIMITS, SPEED, Place  # noqa: E402
from benchmarks.steps import GOOD, Result, run_all, summary  # noqa: E402
from effdet_fast._build_info import covers, read_build_info, sources_hash  # noqa: E402
from effdet_fast.files import write_atomically  # noqa: E402

PACKAGE = ROOT / ".gpu"
LIBRARIES = ("kernels_cpu.so", "kernels_cuda.so")
VARIANTS = "variants"


def fits(folder: Path, capability: tuple[int, int]) -> bool:
    """Whether both libraries are there, built from these sources and, for CUDA, for this GPU."""
    cpu, cuda = (read_build_info(folder / name) for name in LIBRARIES)
    if cpu is None or cuda is None or {cpu["sources"], cuda["sources"]} != {sources_hash(ROOT)}:
        return False
    return covers(cuda["cuda_archs"], capability)


def take_libraries(capability: tuple[int, int]) -> bool:
    """Whether the libraries in place fit and load; those in the package are taken where they fit better."""
    in_place = ROOT / "effdet_fast"
    if not fits(in_place, capability) and fits(PACKAGE, capability):
        for name in LIBRARIES:
            shutil.copy2(PACKAGE / name, in_place)
    load = "from effdet_fast import _libraries; print(_libraries.missing); raise SystemExit(len(_libraries.missing))"
    return fits(in_place, capability) and subprocess.run([sys.executable, "-c", load], cwd=ROOT).returncode == 0


def take_variants(capability: tuple[int, int], work: Path) -> Path | None:
    """The program of benchmarks/variants, if the package has one for this GPU. A copy: what is carried may not be executable."""
    info = read_build_info(PACKAGE / VARIANTS)
    if info is None or not covers(info["cuda_archs"], capability):
        return None
    program = Path(shutil.copy(PACKAGE / VARIANTS, work))
    program.chmod(0o755)
    return program


def not_done(summary_of_correctness: dict[str, Any]) -> dict[str, list[str]]:
    """Names of steps that did not succeed, with the tests of each that failed or were not reached."""
    found = {}
    for name, step in summary_of_correctness["steps"].items():
        tests = step.get("tests")
        names = ledger.Tests(**tests).to_repeat if tests else []
        if names or step["status"] not in GOOD:
            found[name] = names
    return found


class Report:
    """The summary in JSON, rewritten after each step, so that it is there whatever happens to the next."""

    def __init__(self, part: str, place: Place, started: float, about: dict[str, Any]) -> None:
        self.path, self.place, self.started = place.output / f"{part}.json", place, started
        self.content: dict[str, Any] = {"part": part, **about}

    def update(self, results: list[Result]) -> None:
        steps = {}
        for result in results:
            steps[result.name] = {key: value for key, value in asdict(result).items() if key != "name"}
            file = self.place.work / f"{gpu_plan.file_name(result.name)}.jsonl"
            if file.exists():
                steps[result.name]["tests"] = asdict(ledger.read(file))
        self.content |= {"seconds": round(time.monotonic() - self.started, 1), "steps": steps}
        if self.place.record.exists():
            record = records.from_json(self.place.record.read_text())
            self.content["benchmark"] = {"rows": len(record.rows), "missing": record.missing}
        text = json.dumps(self.content, indent=1) + "\n"
        write_atomically(str(self.path), lambda temporary: Path(temporary).write_text(text))

    def lines(self) -> list[str]:
        """What failed, was running at the end, or was not reached, by name; not more of each than one reads."""
        lines = []
        for name, step in self.content["steps"].items():
            tests = step.get("tests", {"failed": {}, "running": [], "not_reached": []})
            for kind in ("failed", "running", "not_reached"):
                names = list(tests[kind])
                lines += [f"{name}: {kind.replace('_', ' ')}: {test}" for test in names[:20]]
                lines += [f"{name}: {kind.replace('_', ' ')}: {len(names) - 20} more"] if len(names) > 20 else []
        missing = self.content.get("benchmark", {"missing": {}})["missing"]
        return lines + [f"not measured: {case}: {why}" for case, why in missing.items()]


def run_part(part: str, output: Path, seconds: float, started: float) -> bool:
    import torch

    from benchmarks.environment import commit_of, describe_device

    device = describe_device(torch.device("cuda"))
    capability = torch.cuda.get_device_capability()
    commit_file = PACKAGE / "commit"
    if commit_file.exists():
        os.environ.setdefault("EFFDET_FAST_COMMIT", commit_file.read_text().strip())
    work = ROOT / "build" / "gpu-work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    output.mkdir(parents=True, exist_ok=True)
    place = Place(
        output=output,
        work=work,
        record=output / f"{device['slug']}-{datetime.now():%Y-%m-%d}.json",
        built=take_libraries(capability),
        sanitizer=shutil.which("compute-sanitizer"),
        ncu=shutil.which("ncu"),
        site=PACKAGE / "site" if (PACKAGE / "site").exists() else None,
        variants=take_variants(capability, work),
    )
    if part == CORRECTNESS:
        plan = gpu_plan.correctness(place)
    else:
        before = next((f for f in (output / "correctness.json", PACKAGE / "correctness.json") if f.exists()), None)
        plan = gpu_plan.speed(place, not_done(json.loads(before.read_text())) if before else {})
    plan = [replace(step, budget=step.budget * seconds / LIMITS[part]) for step in plan]
    about = {"device": device, "torch": torch.__version__, "commit": commit_of(ROOT)[0], "limit": seconds}
    report = Report(part, place, started, about)
    with open(output / f"{part}.log", "w") as log:
        results = run_all(plan, started + seconds, log, report.update)
        text = "\n".join(
            [f"== {part}: {device['name']}, PyTorch {torch.__version__}", summary(results), *report.lines()]
        )
        text += f"\n{time.monotonic() - started:.0f} of {seconds:.0f} s; everything is in {output}"
        log.write(text + "\n")
    print(text)
    return all(result.good for result in results)


def main(command_line: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.py", description=__doc__.partition("\n")[0])
    parser.add_argument("part", nargs="?", choices=(CORRECTNESS, SPEED), help="both, one after the other, by default")
    parser.add_argument(
        "--seconds",
        type=float,
        help="for a part; default " + ", ".join(f"{seconds:.0f} ({part})" for part, seconds in LIMITS.items()),
    )
    arguments = parser.parse_args(command_line)
    import torch

    if not torch.cuda.is_available():
        print("make gpu: PyTorch sees no GPU here; on a machine with one this builds, tests, checks and measures.")
        return 1
    needed = {"pytest-xdist": "xdist", "pytest-timeout": "pytest_timeout", "hypothesis": "hypothesis"}
    if missing := [package for package, module in needed.items() if not importlib.util.find_spec(module)]:
        print(f"make gpu: not installed here: {', '.join(missing)}")
        return 1
    os.chdir(ROOT)
    out = os.environ.get("OUT")
    output = Path(out) if out else ROOT / "build/gpu" / f"{datetime.now():%Y-%m-%d-%H%M%S}"
    good, started = True, START
    for part in [arguments.part] if arguments.part else [CORRECTNESS, SPEED]:
        good &= run_part(part, output, arguments.seconds or LIMITS[part], started)
        started = time.monotonic()
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
