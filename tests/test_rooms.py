"""The structure holds: every op has all its files and kernels, and layers only look down."""

import ast
from pathlib import Path

import pytest
import torch

from benchmarks import OPS
from effdet_fast import _libraries, ops
from effdet_fast.ops import _library

ROOT = Path(__file__).resolve().parents[1]
ROOM = [
    "csrc/{op}/{op}_math.h",
    "csrc/{op}/{op}_kernel.cuh",
    "csrc/{op}/{op}_cuda.cu",
    "csrc/{op}/{op}_cpu.cpp",
    "csrc/{op}/{op}.cpp",
    "effdet_fast/ops/{op}.py",
    "tests/ops/test_{op}.py",
    "benchmarks/bench_{op}.py",
]
LAYERS = [
    {"cli"},
    {"conversion", "detector", "export", "training", "evaluation", "data", "acceleration"},
    {"models"},
    {"nn"},
    {"ops"},
]


@pytest.mark.parametrize("op", OPS)
def test_the_room_is_complete(op):
    missing = [path.format(op=op) for path in ROOM if not (ROOT / path.format(op=op)).exists()]
    assert not missing


def test_every_boundary_is_compiled():
    text = (ROOT / "csrc/boundaries.cpp").read_text()
    assert [op for op in OPS if f'#include "{op}/{op}.cpp"' not in text] == []


def test_every_folder_of_kernels_is_a_known_op():
    assert {p.name for p in (ROOT / "csrc").iterdir() if p.is_dir()} == {*OPS, "common"}


@pytest.mark.parametrize("device_type", ["CPU", "CUDA"])
def test_every_raw_op_has_a_kernel(device_type):
    if device_type.lower() not in _libraries.native_device_types():
        pytest.skip(f"not built for {device_type}")
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    missing = [name for name in _library.SCHEMAS if not has_kernel(f"effdet_fast::{name}", device_type)]
    assert not missing and len(_library.SCHEMAS) >= 2 * len(OPS)


def test_every_function_has_a_reference_beside_it():
    functions = [
        n
        for n in ops.__all__
        if not n.endswith("_reference") and n.islower() and n not in ("set_debug", "use_reference")
    ]
    assert len(functions) >= 8
    assert not [n for n in functions if n != "fast_normalized_fusion" and f"{n}_reference" not in ops.__all__]


def _imported_modules(path: Path) -> set[str]:
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
            modules.update(f"{node.module}.{alias.name}" for alias in node.names)
    return modules


@pytest.mark.parametrize("depth", range(1, len(LAYERS)))
def test_layers_only_look_down(depth):
    above = set().union(*LAYERS[:depth])
    upward = []
    for layer in LAYERS[depth]:
        for path in sorted((ROOT / "effdet_fast" / layer).rglob("*.py")):
            names = {m.split(".")[1] for m in _imported_modules(path) if m.startswith("effdet_fast.")}
            upward += [f"{path.relative_to(ROOT)} imports {name}" for name in sorted(names & above)]
    assert not upward


def test_kernels_see_no_tensor_library():
    """A kernel file compiles without ATen and without the stable ABI, so a host compiler can run it too."""
    offending = []
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".cu", ".cuh") or path.name.endswith(("_math.h", "_cpu.cpp")):
            includes = [line for line in path.read_text().splitlines() if line.startswith("#include <torch/")]
            offending += [f"{path.name}: {line}" for line in includes if "<torch/headeronly/" not in line]
    assert not offending
