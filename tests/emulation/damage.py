"""What the negative controls share: the self-tests of a library, and whether they notice damage to a kernel."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.emulation.build import ROOT, build


def check(library: Path, *names: str) -> subprocess.CompletedProcess:
    """Runs the self-tests of the ops named, or of all, on the emulated library."""
    command = [sys.executable, "-m", "tests.emulation.check", str(library), *names]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def parameters(damages: list[tuple[str, ...]]) -> list:
    """Each compiles an op: the first of an op is for `make test`, the others for `make test-full`."""
    ops = [damage[0] for damage in damages]
    return [
        pytest.param(damage, id=f"{op}-{i}", marks=[pytest.mark.slow] if op in ops[:i] else [])
        for i, (op, damage) in enumerate(zip(ops, damages, strict=True))
    ]


def damaged_csrc(folder: Path, file: str, sound: str, damaged: str) -> Path:
    """A copy of csrc in `folder`, in one file of which `damaged` stands for `sound`."""
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    text = (csrc / file).read_text()
    assert sound in text, "the control no longer fits the kernel"
    (csrc / file).write_text(text.replace(sound, damaged))
    return csrc


def assert_noticed(folder: Path, op: str, self_test: str, file: str, sound: str, damaged: str) -> None:
    """Replaces `sound` by `damaged` in a copy of the kernel's file, in `folder`; the op's self-test must then fail."""
    csrc = damaged_csrc(folder, f"{op}/{file}", sound, damaged)
    done = check(build(csrc, only=op, only_float32=True), self_test)
    assert done.returncode == 1, done.stdout + done.stderr
