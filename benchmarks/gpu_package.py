"""`make gpu-package`: completes .gpu, what a machine with a GPU and no network needs beside this tree, and says how to call.

The libraries and the packages are laid there by the Makefile; this adds which commit they are of.
"""

import json
import sys
from pathlib import Path

from benchmarks.environment import ROOT, commit_of
from benchmarks.gpu import CORRECTNESS, LIBRARIES, LIMITS, PACKAGE, SPEED
from effdet_fast._build_info import read_build_info


def calls() -> list[dict]:
    """A little more time than each part gives itself."""
    return [
        {"command": f"python3 benchmarks/gpu.py {part}", "carry": [PACKAGE.name], "timeout_s": int(LIMITS[part]) + 20}
        for part in (CORRECTNESS, SPEED)
    ]


def main() -> int:
    infos = {name: read_build_info(PACKAGE / name) for name in LIBRARIES}
    if missing := [name for name, info in infos.items() if info is None]:
        print(f"gpu-package: not built: {', '.join(missing)}", file=sys.stderr)
        return 1
    commit, changed = commit_of(ROOT)
    (PACKAGE / "commit").write_text(f"{commit}{'-with-changes' if changed else ''}\n")
    (PACKAGE / "correctness.json").unlink(missing_ok=True)
    files = [path for path in PACKAGE.rglob("*") if path.is_file()]
    megabytes = sum(path.stat().st_size for path in files) / 1e6
    archs = (infos[LIBRARIES[1]] or {})["cuda_archs"]
    print(
        f"{PACKAGE.relative_to(Path.cwd())}: {len(files)} files, {megabytes:.1f} MB, for {archs}. On the machine, in this folder:"
    )
    first, second = calls()
    print(json.dumps(first))
    print(f"then put its {CORRECTNESS}.json into {PACKAGE.name}, so that what it did not reach comes first, and")
    print(json.dumps(second))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
