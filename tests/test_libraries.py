"""The kernels' libraries: no Python in them, one for each device, and what they say about themselves."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from effdet_fast import _choices, _libraries
from effdet_fast._build_info import read_build_info, sources_hash

ROOT = Path(__file__).resolve().parents[1]
# PyTorch's C++ names, as they are mangled; its stable interface has C names.
PYTORCH_CPP = re.compile(r"_ZN?K?(T[VIS])?N?K?(2at|3c10|5torch)")

library = pytest.mark.parametrize("device_type", ["cpu", "cuda"])


def path_of(device_type: str) -> Path:
    if device_type in _libraries.missing:
        pytest.skip(f"{device_type}: {_libraries.missing[device_type]}")
    return _libraries.path_of(device_type)


def output_of(*command: object) -> str:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


def foreign_symbols(file: Path) -> list[str]:
    """Symbols that must come from Python, or from PyTorch but not its stable interface."""
    names = [
        line.split()[-1].partition("@")[0] for line in output_of("nm", "-D", "--undefined-only", file).splitlines()
    ]
    assert len(names) > 10
    return [name for name in names if name.startswith(("Py", "_Py")) or PYTORCH_CPP.match(name)]


def needed_libraries(file: Path) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.+)\]", output_of("readelf", "-d", file))


@library
def test_it_needs_no_python_and_only_the_stable_interface(device_type):
    file = path_of(device_type)
    assert foreign_symbols(file) == []
    needed = needed_libraries(file)
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if name.startswith(("libpython", "libtorch_python"))]
    cuda = [name for name in needed if "cuda" in name]
    assert bool(cuda) == (device_type == "cuda")


def test_foreign_symbols_would_be_seen():
    """Negative control: PyTorch's own Python library has them all."""
    names = foreign_symbols(Path(torch.__file__).parent / "lib/libtorch_python.so")
    for start in ("Py", "_ZN2at", "_ZN3c10", "_ZN5torch"):
        assert any(name.startswith(start) for name in names)


def test_only_one_library_keeps_memory():
    in_library = {device: "CachingAllocator" in output_of("nm", "-C", path_of(device)) for device in ("cpu", "cuda")}
    assert in_library == {"cpu": True, "cuda": False}


@library
def test_what_it_was_built_from_can_be_read_without_loading_it(device_type):
    read = read_build_info(path_of(device_type))
    told = _libraries.build_info()[device_type]
    assert _choices.difference(read.pop("choices")) is None
    assert read.items() <= told.items() and read["sources"] == sources_hash(ROOT)
    assert {"compiler", "torch"} <= read.keys()


def test_other_files_have_no_build_info(tmp_path):
    other = tmp_path / "other.so"
    assert read_build_info(other) is None
    for text in (b"", b"effdet_fast build info: ", b"effdet_fast build info: {\0", b'effdet_fast build info: {"a": 1}'):
        other.write_bytes(text)
        assert read_build_info(other) is None
    other.write_bytes(b'\0effdet_fast build info: {"a": 1}\0')
    assert read_build_info(other) == {"a": 1}


def test_the_hash_is_of_names_and_texts(tmp_path):
    (tmp_path / "csrc/op").mkdir(parents=True)
    (tmp_path / "setup.py").write_text("a")
    source = tmp_path / "csrc/op/op.cpp"
    source.write_text("b")
    before = sources_hash(tmp_path)
    (tmp_path / "csrc/op/notes.txt").write_text("not compiled")
    assert sources_hash(tmp_path) == before
    source.write_text("c")
    changed = sources_hash(tmp_path)
    source.rename(source.with_suffix(".cu"))
    assert len({before, changed, sources_hash(tmp_path)}) == 3


BITS = """
import hashlib, json, sys, warnings
sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
warnings.simplefilter("error")
import torch
from effdet_fast import _libraries, ops
generator = torch.Generator().manual_seed(0)
x = torch.randn(2, 16, 9, 9, generator=generator, requires_grad=True)
weight = torch.randn(16, 1, 3, 3, generator=generator, requires_grad=True)
y = ops.batch_norm_act(ops.depthwise_conv2d(x, weight, padding="same"), None, None, training=True, activation="silu")
ops.sigmoid_focal_loss(y, torch.arange(2 * 16 * 9).view(2, 16, 9) % 11 - 2, reduction="sum").backward()
bits = b"".join(t.detach().numpy().tobytes() for t in (y, x.grad, weight.grad))
print(json.dumps([_libraries.helpers() is not None, hashlib.sha256(bits).hexdigest(), _libraries.build_info()]))
"""


def test_the_python_module_is_optional(tmp_path):
    """The same bits and the same build information with effdet_fast._C and without it."""
    shutil.copytree(ROOT / "effdet_fast", tmp_path / "effdet_fast", ignore=shutil.ignore_patterns("__pycache__"))

    def run() -> list:
        return json.loads(output_of(sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{BITS}"))

    with_it = run()
    for module in (tmp_path / "effdet_fast").glob("_C*.so"):
        module.unlink()
    without_it = run()
    assert (with_it[0], without_it[0]) == (True, False)
    assert with_it[1:] == without_it[1:]


CHOICES = " ".join(_choices.told())


def library_telling(folder: Path, **info: str) -> Path:
    file = folder / "kernels_cuda.so"
    file.write_bytes(b"\0effdet_fast build info: %s\0" % json.dumps(info).encode())
    return file


@pytest.mark.parametrize(
    "told, expected",
    [
        (CHOICES, None),
        ("", "it does not say what its numbers mean"),
        (
            CHOICES.replace("kRelu, kRelu6", "kRelu6, kRelu"),
            r"has Activation\(kNone, kSilu, kRelu6, kRelu\) where .* has Act",
        ),
        (
            CHOICES.replace("kMaxLevels(8)", "kMaxLevels(4)"),
            r"it has kMaxLevels\(4\) where the package has kMaxLevels\(8\)",
        ),
        (CHOICES.replace("BoxCoder(", "Coder("), r"it has Coder\(.*\) where the package has BoxCoder\("),
        (CHOICES + " Padding(kSame)", r"it has Padding\(kSame\) where the package has nothing"),
    ],
)
def test_kernels_with_other_numbers_do_not_load(tmp_path, told, expected):
    reason = _libraries._why_not_here(library_telling(tmp_path, choices=told))
    assert reason is None if expected is None else re.search(f"do not fit this package: .*{expected}", reason)


OTHER_NUMBERS = """
import sys, warnings
sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
import torch
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    from effdet_fast import ops
x = torch.tensor([[[[-1.0, 2.0]]]])
assert ops.batch_norm_act(x, torch.zeros(1), torch.ones(1), eps=0.0, activation="relu").tolist() == [[[[0.0, 2.0]]]]
assert not torch._C._dispatch_has_kernel_for_dispatch_key("effdet_fast::batch_norm_act", "CPU")
print(seen[0].message)
"""


def test_a_build_with_other_numbers_is_told_and_not_used(tmp_path):
    """Of the CPU's own library, with two activations the other way round; the references run in its place."""
    ignored = shutil.ignore_patterns("__pycache__", "kernels_cuda.so")
    shutil.copytree(ROOT / "effdet_fast", tmp_path / "effdet_fast", ignore=ignored)
    file = tmp_path / "effdet_fast" / path_of("cpu").name
    content = file.read_bytes()
    assert content.count(b"kSilu, kRelu,") >= 1
    file.write_bytes(content.replace(b"kSilu, kRelu,", b"kRelu, kSilu,"))
    said = output_of(sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{OTHER_NUMBERS}")
    assert "Activation(kNone, kRelu, kSilu, kRelu6) where the package has Activation(kNone, kSilu," in said
    assert "effdet-fast doctor" in said


def test_the_names_are_those_of_the_functions():
    """One table of activations; each name's function is what its module does."""
    x = torch.linspace(-9, 9, 37)
    for name, module in _choices.ACTIVATION_MODULES.items():
        torch.testing.assert_close(_choices.ACTIVATION_FUNCTIONS[name](x), module()(x))
        assert _choices.Activation(_choices.ACTIVATIONS[name]).name == str(name).lower()


@pytest.mark.parametrize("built, here, loads", [("13.0", "13.2", True), ("13.0", "12.8", False), ("13.0", None, False)])
def test_cuda_kernels_load_where_torch_has_the_same_major(monkeypatch, tmp_path, built, here, loads):
    file = library_telling(tmp_path, cuda=built, choices=CHOICES)
    monkeypatch.setattr(torch.version, "cuda", here)
    reason = _libraries._why_not_here(file)
    assert (reason is None) == loads and (loads or f"built with CUDA {built}" in reason)


def test_a_cpu_library_loads_in_every_torch(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert _libraries._why_not_here(path_of("cpu")) is None


ON_A_GPU = """
import json, sys, warnings
sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
import torch
from effdet_fast import _libraries, ops
from effdet_fast.ops import _library

def activate(x=torch.ones(1, 2, 3, 3), activation="relu"):
    return ops.batch_norm_act(x, torch.zeros(2), torch.ones(2), activation=activation)

def warnings_of(function, device="cuda", again=False):
    _library.device_type = lambda x: device  # what tensors pass for
    _libraries._warned_of_cuda &= not again
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        function()
    return [[each.category.__name__, str(each.message), each.filename] for each in seen]

def referenced():
    with ops.use_reference():
        activate()

compiled = torch.compile(activate, backend="eager", fullgraph=True)
print(json.dumps({
    "on the CPU": warnings_of(activate, "cpu"),
    "elsewhere": warnings_of(activate, "meta"),
    "use_reference": warnings_of(referenced),
    "first": warnings_of(activate),
    "second": warnings_of(activate) + warnings_of(lambda: ops.nms(torch.ones(1, 4), torch.ones(1), 0.5)),
    "compiled": warnings_of(compiled, again=True),
    "compiled, second": warnings_of(compiled),
}))
"""


def test_references_on_a_gpu_are_told_once(tmp_path):
    """Of a build for the CPU alone; compiled, too, which must not break the graph."""
    ignored = shutil.ignore_patterns("__pycache__", "kernels_cuda.so")
    shutil.copytree(ROOT / "effdet_fast", tmp_path / "effdet_fast", ignore=ignored)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{ON_A_GPU}"
    seen = json.loads(output_of(sys.executable, "-c", code))
    ((category, message, _),) = first = seen.pop("first")
    assert category == "UserWarning" and "(not built)" in message and _libraries.REBUILD_CUDA in message
    assert first[0][2] == "<string>"  # the line that called the op
    assert [each[1] for each in seen.pop("compiled")] == [message]
    assert not any(seen.values()), seen
