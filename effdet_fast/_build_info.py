"""What a library of kernels was built from, read from its file without loading it. `setup.py` uses this too: no torch here."""

import hashlib
import json
import mmap
from pathlib import Path
from typing import Any

MARK = "effdet_fast build info: "  # stands before the JSON text in the file, see csrc/library.cpp


def sources_hash(root: Path) -> str:
    """Of all that the libraries are built from: `csrc` and `setup.py` in the source folder `root`."""
    digest = hashlib.sha256()
    files = (path for path in (root / "csrc").rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu"))
    for path in sorted([*files, root / "setup.py"]):
        text = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(text)}\n".encode() + text)
    return digest.hexdigest()[:16]


def read_build_info(library: Path) -> dict[str, Any] | None:
    """The build information in a library's file; None where there is no such file, or it is not one of ours."""
    try:
        # Mapped, as importing the package asks this of CUDA's library, which has 16 MB for each architecture.
        with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            begin = content.find(f"{MARK}{{".encode())  # much faster than a regular expression
            return json.loads(content[begin + len(MARK) : content.find(b"\0", begin)]) if begin >= 0 else None
    except (OSError, ValueError):
        return None


def covers(cuda_archs: str, capability: tuple[int, int]) -> bool:
    """Code for sm_XY runs on sm_XZ with Z >= Y; PTX of the newest one runs on everything newer."""
    archs = [(int(a[3:-1]), int(a[-1])) for a in cuda_archs.replace("a", "").split(", ") if a.startswith("sm_")]
    same_major = any(major == capability[0] and minor <= capability[1] for major, minor in archs)
    return same_major or ("PTX" in cuda_archs and bool(archs) and max(archs) <= capability)
