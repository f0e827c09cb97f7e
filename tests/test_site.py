"""The site is built without a warning, and its reference has every public name."""

import importlib
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from tests.public_names import PACKAGES

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def documented(tmp_path_factory) -> set[str]:
    """Names with an entry in the reference, from the inventory that other sites link by."""
    site = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    done = subprocess.run(
        build, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr
    inventory = (site / "objects.inv").read_bytes()
    entries = zlib.decompress(inventory[inventory.index(b"zlib.\n") + 6 :]).decode()
    return {line.split()[0] for line in entries.splitlines()}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_reference_has_every_public_name(documented, package):
    module = importlib.import_module(f"effdet_fast.{package}".rstrip("."))
    missing = []
    for name in module.__all__:
        home = getattr(getattr(module, name), "__module__", module.__name__)
        if not {f"{module.__name__}.{name}", f"{home}.{name}"} & documented and not name.startswith("__"):
            missing.append(name)
    assert not missing
