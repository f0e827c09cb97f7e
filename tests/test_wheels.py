"""The wheels of `make wheel`: what is in them, and that a name which promises too much is refused.

tests/test_install.py builds the one of Python alone.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from effdet_fast import _libraries
from tests import wheels

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "effdet_fast", "csrc")

PURE = ["effdet_fast/ops/nms.py", "effdet_fast/py.typed", "effdet_fast-0.1.0.dist-info/RECORD"]
FILES = [*PURE, "effdet_fast/kernels_cpu.so", "effdet_fast/kernels_cuda.so"]
SYMBOLS = {"libc.so.6": ["GLIBC_2.2.5", "GLIBC_2.34", "GLIBC_PRIVATE"], "libstdc++.so.6": ["GLIBCXX_3.4.21"]}
FOUND = {"versioned_symbols": SYMBOLS, "external_libs": {"libc10.so": None, "libcudart.so.13": "/lib/libcudart.so.13"}}
NOTHING: dict = {"versioned_symbols": {}, "external_libs": {}}


@pytest.mark.parametrize(
    "glibc, fits", [("2_28", False), ("2_33", False), ("2_34", True), ("2_41", True), ("3_0", True)]
)
def test_a_library_with_a_newer_symbol_than_its_tag_is_refused(glibc, fits):
    faults = wheels.faults(f"effdet_fast-0.1.0-py3-none-manylinux_{glibc}_x86_64.whl", FILES, FOUND)
    assert faults == ([] if fits else ["it needs glibc 2.34, newer than its tag"])


@pytest.mark.parametrize(
    "tag, files, found, expected",
    [
        ("py3-none-any", PURE, NOTHING, None),
        ("py3-none-any", FILES, FOUND, "kernels_cpu.so does not run on any machine"),
        ("py3-none-any", ["effdet_fast/ops/nms.py"], NOTHING, "py.typed is missing"),
        ("py3-none-any", [*PURE, "tests/checks.py"], NOTHING, "tests/checks.py does not belong"),
        ("py3-none-any", [*PURE, "effdet_fast/nms.cpp"], NOTHING, "nms.cpp does not belong"),
        ("py3-none-manylinux_2_34_x86_64", [*FILES, "effdet_fast/_C.so"], FOUND, "_C.so does not belong"),
        ("py3-none-manylinux_2_34_x86_64", PURE, NOTHING, "kernels_cpu.so is missing"),
        ("cp311-cp311-manylinux_2_34_x86_64", FILES, FOUND, "its tag is neither"),
        ("py3-none-linux_x86_64", FILES, FOUND, "its tag is neither"),
        (
            "py3-none-manylinux_2_34_x86_64",
            FILES,
            {**FOUND, "external_libs": {"libgomp.so.1": None}},
            "libgomp.so.1 does not come with torch",
        ),
    ],
)
def test_a_wheel_that_its_name_does_not_fit_is_refused(tag, files, found, expected):
    faults = "; ".join(wheels.faults(f"effdet_fast-0.1.0-{tag}.whl", files, found))
    assert expected in faults if expected else not faults


def test_the_wheel_with_kernels(tmp_path, capsys):
    """Of the libraries that were built for the tests; compiling takes minutes."""
    if "cpu" in _libraries.missing or sys.platform != "linux":
        pytest.skip("no kernels to pack")
    for name in SOURCES:  # a copy, so that the build leaves no trace in the source folder
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    (tmp_path / "built/effdet_fast").mkdir(parents=True)
    for library in (ROOT / "effdet_fast").glob("kernels_*.so"):
        shutil.copy(library, tmp_path / "built/effdet_fast")
    (tmp_path / "setup.cfg").write_text("[build]\nbuild_lib = built\n")
    command = [sys.executable, "-W", "ignore", "setup.py", "-q", "build_py", "bdist_wheel", "--skip-build"]
    done = subprocess.run(
        [*command, "--dist-dir", "unaudited"],
        cwd=tmp_path,
        env=os.environ | {"EFFDET_FAST_WHEEL": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    (unaudited,) = (tmp_path / "unaudited").glob("*.whl")
    assert "-py3-none-linux_" in unaudited.name, done.stderr
    assert wheels.main([str(unaudited)]) == 1

    dist = tmp_path / "dist"
    old = wheels.repair(unaudited, dist, "--plat", "manylinux_2_5_x86_64")
    assert old.returncode != 0 and "too-recent versioned symbols" in old.stderr
    done = wheels.repair(unaudited, dist)
    (wheel,) = dist.glob("*.whl")
    assert "-py3-none-manylinux_" in wheel.name, done.stderr
    assert wheels.main([str(wheel)]) == 0, capsys.readouterr().out
