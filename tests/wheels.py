"""Names a wheel after the glibc that it needs, and refuses one that its name does not fit.

python -m tests.wheels FILE ...                 list them with what they need from outside, and check them
python -m tests.wheels --repair FILE FOLDER     write one into the folder under auditwheel's name for it
"""

import json
import re
import subprocess
import sys
import zipfile
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

# torch brings these, or the packages that it depends on do: a wheel must not copy them.
FROM_TORCH = [f"lib{name}.so" for name in ("torch", "torch_cpu", "torch_cuda", "c10", "c10_cuda")]
FROM_TORCH += ["libcudart.so.[0-9]", "libcudart.so.[0-9][0-9]"]
OURS = re.compile(r"effdet_fast/(.*/)?([^/]*\.py|py\.typed|kernels_\w+\.so)?|effdet_fast-[^/]*\.dist-info/.*")


def audit(wheel: Path) -> dict[str, Any]:
    """What `auditwheel show` finds, most of all `versioned_symbols` and `external_libs`, both empty for Python alone."""
    command = [sys.executable, "-m", "auditwheel", "show", "--json", "--allow-pure-python-wheel", str(wheel)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {"versioned_symbols": {}, "external_libs": {}} | found


def repair(wheel: Path, folder: Path, *options: str) -> subprocess.CompletedProcess:
    """`auditwheel repair`, which copies nothing and takes the oldest glibc that has the symbols, unless `options` say which."""
    excluded = [f"--exclude={pattern}" for pattern in FROM_TORCH]
    command = [sys.executable, "-m", "auditwheel", "repair", "--patcher", "none", *excluded, *options]
    return subprocess.run(
        [*command, "--wheel-dir", str(folder), str(wheel)], capture_output=True, text=True, check=False
    )


def newest_glibc(found: dict[str, Any]) -> tuple[int, int]:
    names = [name for names in found["versioned_symbols"].values() for name in names]
    versions = [re.match(r"GLIBC_(\d+)\.(\d+)", name) for name in names]
    return max(((int(version[1]), int(version[2])) for version in versions if version), default=(0, 0))


def faults(name: str, files: list[str], found: dict[str, Any]) -> list[str]:
    """Why a wheel of this name must not hold these files, with what `audit` found in them; empty where all is well."""
    faults = [f"{file} does not belong into a wheel" for file in files if not OURS.fullmatch(file)]
    if "effdet_fast/py.typed" not in files:
        faults.append("py.typed is missing")
    foreign = [lib for lib in found["external_libs"] if not any(fnmatchcase(lib, pattern) for pattern in FROM_TORCH)]
    faults += [f"{lib} does not come with torch" for lib in foreign]
    libraries = [file for file in files if file.endswith(".so")]
    tag = re.search(r"-py3-none-(any|manylinux_(\d+)_(\d+)_\w+)\.whl$", name)
    if tag is None:
        faults.append("its tag is neither py3-none-any nor py3-none-manylinux_*")
    elif tag[1] == "any":
        faults += [f"{file} does not run on any machine" for file in libraries]
    else:
        if "effdet_fast/kernels_cpu.so" not in files:
            faults.append("kernels_cpu.so is missing")
        if (glibc := newest_glibc(found)) > (int(tag[2]), int(tag[3])):
            faults.append("it needs glibc {}.{}, newer than its tag".format(*glibc))
    return faults


def main(wheels: list[str]) -> int:
    if wheels[:1] == ["--repair"]:
        done = repair(*map(Path, wheels[1:]))
        print(done.stderr, end="")
        return done.returncode
    failed = False
    for wheel in map(Path, wheels):
        with zipfile.ZipFile(wheel) as archive:
            files = archive.namelist()
        found = audit(wheel)
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB")
        if found["external_libs"]:
            print("    glibc {}.{}".format(*newest_glibc(found)), *sorted(found["external_libs"]), sep=", ")
        for fault in faults(wheel.name, files, found):
            print(f"    FAILED {fault}")
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
