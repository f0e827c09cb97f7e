"""The figures of kernels that must not get worse, launches a call among them, each with a damage that is noticed."""

import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import torch

from benchmarks import OPS, cuobjdump
from benchmarks.hot_kernels import hot, main_path
from benchmarks.launches import calls
from benchmarks.prediction import walk
from tests.benchmarks.test_kernels import NVCC
from tests.emulation.build import INCLUDE, ROOT, build
from tests.emulation.damage import damaged_csrc

# Launches of one call, forward and backward, over all cases.
LAUNCHES = {
    "focal_loss": ({2}, {1}),
    "detection_loss": ({2}, {1}),
    "fusion": ({1}, {2, 3}),
    "depthwise_conv": ({1}, {2}),
    "nms": ({1}, set()),
    "soft_nms": ({1}, set()),
    "anchor_matching": ({2, 3}, set()),
    "batch_norm_act": ({1, 3}, {3}),
    "decode_detections": ({15}, set()),
    "squeeze_excite": ({5}, {7}),
}
COUNT = """
import sys
from pathlib import Path
from tests.benchmarks.test_kernel_figures import launches_of
print(launches_of("batch_norm_act", Path(sys.argv[1])))
"""


def launches_of(op: str, library: Path | None = None) -> tuple[set[int], set[int]]:
    found: dict[str, set[int]] = {"forward": set(), "backward": set()}
    for layout in ("channels_last", "contiguous"):
        for call in calls(op, torch.float32, layout, library=library):
            found[call.phase].add(len(call.launches))
    return found["forward"], found["backward"]


@pytest.mark.parametrize("op", OPS)
def test_launches_a_call(op):
    assert launches_of(op) == LAUNCHES[op]


def test_a_launch_too_many_is_noticed(tmp_path):
    launch = 'launch("batch_norm_finish_stats"'
    twice = f"for (int i = 0; i < 2; ++i) {launch}"
    csrc = damaged_csrc(tmp_path, "batch_norm_act/batch_norm_act_cuda.cu", launch, twice)
    library = build(csrc, only="batch_norm_act", only_float32=True)
    command = [sys.executable, "-c", COUNT, str(library)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "({1, 4}, {3})\n"


# Of a round of the main path: loads under way at a wait, on average, at least; instructions between a load and the wait for it,
# the median, at least; bytes of a thread's loads and stores, exactly. And no stack.
FIGURES = {
    "depthwise_conv::depthwise_conv_kernel<3, 1, 4, 2, false, float>": (6.0, 100, {8}, {8}),
    "depthwise_conv::depthwise_conv_kernel<5, 1, 4, 2, false, float>": (8.0, 200, {8}, {8}),
    "depthwise_conv::depthwise_conv_kernel<3, 1, 4, 2, false, c10::BFloat16>": (6.0, 130, {4}, {4}),
    "depthwise_conv::depthwise_conv_kernel<5, 1, 4, 2, false, c10::BFloat16>": (8.0, 260, {4}, {4}),
    "depthwise_conv::depthwise_conv_kernel<5, 1, 4, 2, false, c10::Half>": (8.0, 260, {4}, {4}),
    "depthwise_conv::depthwise_conv_kernel<5, 1, 4, 1, true, c10::BFloat16>": (5.0, 120, {8, 2}, {8}),
    "depthwise_conv::depthwise_conv_grad_input_kernel<5, 1, 4, 2, false, c10::BFloat16>": (8.0, 260, {4}, {4}),
    "depthwise_conv::depthwise_conv_grad_input_kernel<3, 2, 2, 2, false, c10::BFloat16>": (3.0, 100, {4}, {4}),
    "batch_norm_act::batch_norm_stats_kernel<true, 8, c10::BFloat16>": (4.0, 10, {16}, set()),
    "batch_norm_act::batch_norm_act_kernel<true, 8, (ef::Activation)1, c10::BFloat16>": (4.0, 10, {16}, {16}),
    "batch_norm_act::batch_norm_act_sums_kernel<true, 8, (ef::Activation)1, c10::BFloat16>": (4.0, 10, {16}, set()),
    "batch_norm_act::batch_norm_act_grad_input_kernel<true, 8, (ef::Activation)1, c10::BFloat16>": (
        4.0,
        10,
        {16},
        {16},
    ),
    "squeeze_excite::squeeze_excite_reduce_kernel<true, 8, true, c10::BFloat16>": (4.0, 10, {16}, set()),
    "squeeze_excite::squeeze_excite_scale_kernel<false, 8, false, c10::BFloat16>": (4.0, 10, {16}, {16}),
    "fusion::fusion_kernel<2, (ef::Resample)1, false, 8, c10::BFloat16>": (5.0, 8, {16}, {16}),
    "fusion::fusion_kernel<3, (ef::Resample)2, true, 8, c10::BFloat16>": (5.0, 20, {16}, {8, 16}),
    "fusion::fusion_backward_kernel<2, (ef::Resample)1, 8, c10::BFloat16>": (9.0, 15, {16}, {16}),
    "fusion::fusion_backward_kernel<3, (ef::Resample)0, 8, c10::BFloat16>": (4.0, 10, {16}, {16}),
    "fusion::fusion_max_pool_backward_kernel<8, c10::BFloat16>": (6.0, 20, {8, 16}, {16}),
}
FILES = ("depthwise_conv", "batch_norm_act", "squeeze_excite", "fusion")
# (what fails, a kernel of FIGURES, a file of csrc, its text to damage, what it becomes)
DEPTHWISE = "conv_kernel<3, 1, 4, 2, false, float>", "depthwise_conv/depthwise_conv_kernel.cuh"
WALK = "batch_norm_stats_kernel<", "common/vector_walk.cuh"
SCALE = "excite_scale_kernel<", "squeeze_excite/squeeze_excite_kernel.cuh"
FUSION = "fusion_backward_kernel<2, (ef::Resample)1", "fusion/fusion_kernel.cuh"
ONE_BY_ONE = "Packed<T, kSize> r; for (int i = 0; i < kSize; ++i) reinterpret_cast<T*>(&r)[i] = p[i]; return r;"
DAMAGES = [
    ("ahead", *DEPTHWISE, "(sizeof(scalar_t) < 8), scalar_t> input", "false, scalar_t> input"),
    ("stack", *DEPTHWISE, "sum[(i + 1) % kRows]", "sum[(i + 1 + rows) % kRows]"),
    ("loads", *WALK, "4 / kTensors", "1"),
    ("stores", *SCALE, "store_vec<kVec>(y + i, out);", "y[i] = out.v[0];"),
    ("widths", SCALE[0], "common/vec.cuh", "return *reinterpret_cast<const Packed<T, kSize>*>(p);", ONE_BY_ONE),
    (
        "loads",
        *FUSION,
        "unpacked<kVec, scalar_t>(tile.plain[j][i])",
        "load_values<kVec>(p.inputs[i].x + tile.at[j])",
    ),
]


def failing(csrc: Path, folder: Path, kernels: list[str]) -> dict[str, set[str]]:
    """Which figures of these kernels are worse than FIGURES, as this source is compiled."""
    instances = "".join(f"auto instance_{i} = &ef::{kernel};\n" for i, kernel in enumerate(kernels))
    includes = "".join(f'#include "{csrc}/{name}/{name}_kernel.cuh"\n' for name in FILES)
    (folder / "kernels.cu").write_text(includes + instances)
    options = ["-std=c++20", "-O1", "--expt-relaxed-constexpr", "-arch=sm_90", "-cubin", f"-I{INCLUDE}"]
    cubin = folder / "kernels.cubin"
    subprocess.run(["nvcc", *options, "-o", str(cubin), str(folder / "kernels.cu")], check=True, capture_output=True)
    tool = cuobjdump.find_cuobjdump()
    stacks = {symbol: found.stack for (symbol, _), found in cuobjdump.resources(cubin, tool).items()}
    found = {}
    for symbol, _, code in cuobjdump.codes(cubin, tool):
        (name,) = cuobjdump.readable([symbol])
        kernel = next(kernel for kernel in kernels if kernel.replace("ef::", "") == name)
        loads, ahead, load_widths, store_widths = FIGURES[kernel]
        once = walk(main_path(hot(name), code)[1])
        bad = {
            "stack": stacks[symbol] > 0,
            "loads": once.loads_in_flight < loads,
            "ahead": median(once.ahead) < ahead,
            "widths": set(once.loads) != load_widths,
            "stores": set(once.stores) != store_widths,
        }
        found[kernel] = {what for what, is_bad in bad.items() if is_bad}
    return found


@pytest.fixture(scope="module")
def nvcc():
    if shutil.which("nvcc") is None or cuobjdump.find_cuobjdump() is None:
        pytest.skip("needs nvcc and cuobjdump")
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    if f"V{NVCC}" not in version:
        pytest.skip(f"the figures are of nvcc {NVCC}")


def test_figures_of_the_machine_code(nvcc, tmp_path):
    assert failing(ROOT / "csrc", tmp_path, list(FIGURES)) == {kernel: set() for kernel in FIGURES}


@pytest.mark.parametrize("figure, name, file, sound, damaged", DAMAGES)
def test_a_worse_figure_is_noticed(nvcc, tmp_path, figure, name, file, sound, damaged):
    (kernel,) = [kernel for kernel in FIGURES if name in kernel]
    csrc = damaged_csrc(tmp_path, file, sound, damaged)
    assert figure in failing(csrc, tmp_path, [kernel])[kernel]
