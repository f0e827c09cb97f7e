"""Builds the kernels: effdet_fast/kernels_cpu.so always, kernels_cuda.so where a toolkit that fits PyTorch is found.

No Python is in these libraries: any CPython loads them, and any torch from 2.11 on (for CUDA: of the toolkit's major version).
effdet_fast._C beside them, helpers in pybind11, is for this Python and optional.

EFFDET_FAST_CUDA = auto (default) | 0 | 1 (fail if CUDA cannot be built)   EFFDET_FAST_EXTENSION = 1 (default) | 0 (Python only)
EFFDET_FAST_WHEEL = 1 leaves out effdet_fast._C, so that one wheel fits every Python; `make wheel` sets it.
TORCH_CUDA_ARCH_LIST, CUDA_HOME, MAX_JOBS as everywhere in PyTorch. ccache is used where it is found.
"""

import json
import os
import platform
import shutil
import sys
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT / "csrc")]  # a build back end does not look here
# pip puts ninja beside Python, and PATH does not lead there in a virtual environment that is not active.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])

from toolkit import choose_cuda, cuda_archs, output_of  # noqa: E402

from effdet_fast._build_info import sources_hash  # noqa: E402

TORCH_TARGET = "0x020b000000000000"  # stable ABI of torch 2.11: loads there and in every later release


def use_ccache(toolkit: tuple[Path, str] | None) -> None:
    """Newer PyTorch takes ccache by itself; 2.11 can be told its compilers."""
    from torch.utils import cpp_extension

    if shutil.which("ccache") and not hasattr(cpp_extension, "_wrap_compiler"):
        cpp_extension.get_cxx_compiler = lambda: f"ccache {os.environ.get('CXX', 'c++')}"
        if toolkit:
            os.environ.setdefault("PYTORCH_NVCC", f"ccache {toolkit[0]}/bin/nvcc")


def python_module() -> list[Extension]:
    try:
        import pybind11
    except ImportError:
        print("effdet_fast: pybind11 is not installed: building without the helpers in effdet_fast._C")
        return []
    flags = {"cxx": ["-O1", "-g0", "-std=c++20", "-fvisibility=hidden"]}
    options = {"include_dirs": [pybind11.get_include()], "extra_compile_args": flags, "language": "c++"}
    return [Extension("effdet_fast._C", ["csrc/module.cpp"], **options)]


def native_extensions() -> tuple[list[Extension], dict]:
    toolkit = choose_cuda()
    if toolkit:
        os.environ["CUDA_HOME"] = str(toolkit[0])  # before cpp_extension is imported: it looks only once
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    use_ccache(toolkit)
    compiler_version = output_of(os.environ.get("CXX", "c++"), "--version")
    is_gcc = "Free Software Foundation" in compiler_version
    cpu_levels = "avx2, avx512" if is_gcc and platform.machine() in ("x86_64", "AMD64") else "baseline"
    common = {
        "sources": sources_hash(ROOT),
        "compiler": compiler_version.partition("\n")[0],
        "torch": torch.__version__,
    }
    infos = {"kernels_cpu": {**common, "cpu_levels": cpu_levels}}
    built = f"CPU ({cpu_levels})"
    if toolkit:
        archs = cuda_archs()
        infos["kernels_cuda"] = {**common, "cuda": toolkit[1], "cuda_archs": archs}
        built += f" + CUDA {toolkit[1]} ({archs})"

    # Kernels in <op>_cpu*.cpp belong to the CPU's library, in <op>_cuda*.cu to CUDA's; the rest is compiled once for each.
    shared = ["csrc/boundaries.cpp", "csrc/library.cpp"]
    own = {"kernels_cpu": "*/*_cpu*.cpp", "kernels_cuda": "*/*_cuda*.cu"}
    headers = sorted(str(path) for path in Path("csrc").rglob("*") if path.suffix in (".h", ".cuh"))
    # Errors name their file; nobody needs to know where it lay.
    unplaced = [f"-ffile-prefix-map={ROOT}/=", f"-ffile-prefix-map={Path(torch.__file__).parent}/=torch/"]
    hidden = "-fvisibility=hidden"
    optimized = "-O3 -g0 -std=c++20 -fno-math-errno -fno-trapping-math -fopenmp-simd".split()
    cpu_flags = [*optimized, hidden, *unplaced]
    # -O1 is for the host's part, which only launches: it compiles faster. nvcc optimizes kernels fully in any case.
    cuda_flags = {
        "cxx": ["-O1", "-g0", "-std=c++20", hidden, *unplaced],
        "nvcc": ["-O1", "-std=c++20", "-Xcompiler", ",".join([hidden, *unplaced])],
    }

    def library(name: str) -> Extension:
        cuda = name == "kernels_cuda"
        extension = (CUDAExtension if cuda else CppExtension)(
            f"effdet_fast.{name}",
            sorted([*shared, *(str(path) for path in Path("csrc").glob(own[name]))]),
            depends=headers,
            define_macros=[
                ("TORCH_TARGET_VERSION", TORCH_TARGET),
                *([("EF_WITH_CUDA", None), ("USE_CUDA", None)] if cuda else []),
            ],
            extra_compile_args=cuda_flags if cuda else {"cxx": cpu_flags},
            extra_link_args=["-Wl,--as-needed"] if sys.platform == "linux" else [],
        )
        extension.libraries.remove("torch_python")
        return extension

    class Build(BuildExtension):
        def get_ext_filename(self, ext_name):
            if ext_name.rpartition(".")[2] in infos:
                return f"{ext_name.replace('.', os.sep)}.so"  # no Python in it, and none in its name
            return super().get_ext_filename(ext_name)

        def build_extension(self, ext):
            """Each in a folder of its own, where ninja keeps its log; there lies what library.cpp says about the build."""
            folder, name = self.build_temp, ext.name.rpartition(".")[2]
            self.build_temp = str(Path(folder).resolve() / name)
            if name in infos:
                header = Path(self.build_temp) / "build_info.h"
                members = json.dumps(infos[name])[1:-1]
                text = f"#define EF_BUILD_INFO {json.dumps(members)}\n"
                header.parent.mkdir(parents=True, exist_ok=True)
                if not header.exists() or header.read_text() != text:
                    header.write_text(text)
                ext.include_dirs.append(self.build_temp)
            super().build_extension(ext)
            self.build_temp = folder

        def run(self):
            super().run()
            print(f"effdet_fast: {built}")

    libraries = [*map(library, infos)]
    if os.environ.get("EFFDET_FAST_WHEEL") == "1":
        return libraries, {"build_ext": Build, "bdist_wheel": WheelForAnyPython}
    return [*libraries, *python_module()], {"build_ext": Build}


class WheelForAnyPython(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


if os.environ.get("EFFDET_FAST_EXTENSION", "1") == "0":
    print("effdet_fast: Python only; every op runs on its reference implementation")
    setup()
else:
    modules, commands = native_extensions()
    setup(ext_modules=modules, cmdclass=commands)
