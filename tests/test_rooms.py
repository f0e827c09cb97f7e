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
# Each knows only those below it, and of those in one line none knows another.
LAYERS = [
    ["cli"],
    ["training", "export", "prediction", "acceleration"],
    ["detector"],
    ["evaluation", "checkpoints.convert"],
    ["checkpoints.identify", "checkpoints.format"],
    ["models"],
    ["data", "checkpoints.files"],
    ["checkpoints.names", "drawing"],
    ["nn"],
    ["diagnostics"],
    ["self_tests"],
    ["random_calls"],
    ["ops"],
    ["cpu_tuning"],
    ["_libraries"],
    ["_build_info", "_choices", "device", "files", "version", "checkpoints"],
]
FOLDERS = ("effdet_fast", "csrc", "tests", "benchmarks", "examples")
SOURCES = (".py", ".cpp", ".h", ".cu", ".cuh")


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


def _layer_of(module: str) -> int | None:
    """The number of a module's layer, by the longest name that it begins with; None for the package's own `__init__`."""
    named = {f"effdet_fast.{name}": depth for depth, layer in enumerate(LAYERS) for name in layer}
    parts = module.split(".")
    return next((named[name] for n in range(len(parts), 1, -1) if (name := ".".join(parts[:n])) in named), None)


def _imported_modules(path: Path) -> set[str]:
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {name for name in modules if name.startswith("effdet_fast.")}


def test_layers_only_look_down():
    wrong = []
    for path in sorted((ROOT / "effdet_fast").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if module in ("effdet_fast", "effdet_fast.__main__"):
            continue
        own = _layer_of(module)
        assert own is not None, f"{module} is in no layer"
        home = next(name for name in LAYERS[own] if f"{module}.".startswith(f"effdet_fast.{name}."))
        for name in sorted(_imported_modules(path)):
            depth = _layer_of(name)
            inside = f"{name}.".startswith(f"effdet_fast.{home}.")
            if depth is not None and depth <= own and not inside:
                wrong.append(f"{module} imports {name}")
    assert not wrong


def test_kernels_see_no_tensor_library():
    """A kernel file compiles without ATen and without the stable ABI, so a host compiler can run it too."""
    offending = []
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".cu", ".cuh") or path.name.endswith(("_math.h", "_cpu.cpp")):
            includes = [line for line in path.read_text().splitlines() if line.startswith("#include <torch/")]
            offending += [f"{path.name}: {line}" for line in includes if "<torch/headeronly/" not in line]
    assert not offending


def test_no_file_is_too_long_to_be_read_at_once():
    sources = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SOURCES]
    pages = [*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")]
    pages.remove(ROOT / "docs" / "benchmarks.md")  # it grows with each machine, and nobody writes it
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in [*sources, *pages]}
    assert len(lengths) > 300
    assert {name: length for name, length in lengths.items() if length > 400} == {}
