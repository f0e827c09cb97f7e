"""The emulation notices what it is there to notice: each test damages a kernel and asserts that the checks fail."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.emulation.build import ROOT, build

# (op, self-test, file, the text to damage, what it becomes)
DAMAGES = [
    ("focal_loss", "sigmoid_focal_loss", "focal_loss_kernel.cuh", "column = 0, ++row", "column = 1, ++row"),
    (
        "focal_loss",
        "sigmoid_focal_loss",
        "focal_loss_kernel.cuh",
        "i < count; i += blockDim.x",
        "i + 1 < count; i += blockDim.x",
    ),
    (
        "focal_loss",
        "sigmoid_focal_loss",
        "focal_loss_kernel.cuh",
        "store_vec<kSize>(grad_logits + i, out);",
        "store_vec<kSize>(grad_logits + i + 8, out);",
    ),
    (
        "detection_loss",
        "detection_loss",
        "detection_loss_kernel.cuh",
        "if (column == p.classes) {",
        "if (column == p.classes + 1) {",
    ),
    (
        "detection_loss",
        "detection_loss",
        "detection_loss_kernel.cuh",
        "(pixel + k) * p.per_cell + anchor]",
        "(pixel + k) * p.per_cell]",
    ),
    (
        "fusion",
        "weighted_fusion",
        "fusion_kernel.cuh",
        "if (y < up || x < left) continue;",
        "if (y < up || x <= left) continue;",
    ),
    (
        "depthwise_conv",
        "depthwise_conv2d",
        "depthwise_conv_kernel.cuh",
        "oy * kStride - s.top + ky;",
        "oy * kStride - s.top + ky + 1;",
    ),
    (
        "depthwise_conv",
        "depthwise_conv2d_levels",
        "depthwise_conv_kernel.cuh",
        "(blockIdx.y - task.first_block) * slab_rows",
        "blockIdx.y * slab_rows",
    ),
    ("nms", "batched_nms_padded", "nms_tile.cuh", "lane > i && lane < count", "lane > i + 1 && lane < count"),
    ("nms", "batched_nms_padded", "nms_kernel.cuh", "earlier < number", "earlier + 1 < number"),
    ("nms", "batched_nms_padded", "nms_kernel.cuh", "kept_before >= in.most", "kept_before + 64 >= in.most"),
    ("nms", "batched_nms_padded", "nms_block_kernel.cuh", "k < found && alive", "k < found / 2 && alive"),
    ("nms", "batched_nms_padded", "nms_block_kernel.cuh", "own_tile > tile)", "own_tile > tile + 1)"),
    ("soft_nms", "soft_nms", "soft_nms_kernel.cuh", "i == best.index", "i + 1 == best.index"),
    ("soft_nms", "soft_nms", "soft_nms_kernel.cuh", "if (labels[i] == label)", "if (labels[i] <= label)"),
    (
        "anchor_matching",
        "match_anchors",
        "anchor_matching_kernel.cuh",
        "own.warp_first + __ffs",
        "own.warp_first + 1 + __ffs",
    ),
    ("anchor_matching", "match_anchors", "anchor_matching_kernel.cuh", "mask = kWarpSize / 2", "mask = kWarpSize / 4"),
    ("batch_norm_act", "batch_norm_act", "batch_norm_act_kernel.cuh", "row < rows; ++row", "row + 1 < rows; ++row"),
    (
        "batch_norm_act",
        "batch_norm_act",
        "batch_norm_act_kernel.cuh",
        "threadIdx.x / kWarpSize;",
        "threadIdx.x / kWarpSize + 1;",
    ),
    (
        "decode_detections",
        "decode_detections",
        "decode_detections_kernel.cuh",
        "last_place - index <",
        "last_place - index <=",
    ),
    (
        "decode_detections",
        "decode_detections",
        "decode_detections_kernel.cuh",
        "missing -= sums[group]",
        "missing -= 0",
    ),
    (
        "squeeze_excite",
        "squeeze_excite",
        "squeeze_excite_kernel.cuh",
        "line < height; ++line",
        "line + 1 < height; ++line",
    ),
    (
        "squeeze_excite",
        "squeeze_excite",
        "squeeze_excite_kernel.cuh",
        "i = threadIdx.y; i < parts",
        "i = threadIdx.y + 1; i < parts",
    ),
]


def check(library: Path, *names: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tests.emulation.check", str(library), *names]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_sound_kernels_pass():
    done = check(build())
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_removed_barrier_is_noticed():
    library = build(defines=("EF_EMULATION_WITHOUT_BARRIERS",), only="focal_loss")
    done = check(library, "sigmoid_focal_loss")
    assert done.returncode == 1, done.stdout + done.stderr


@pytest.mark.parametrize("op,self_test,file,sound,damaged", DAMAGES, ids=[f"{d[0]}-{i}" for i, d in enumerate(DAMAGES)])
def test_a_damaged_kernel_is_noticed(tmp_path, op, self_test, file, sound, damaged):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    source = tmp_path / "csrc" / op / file
    text = source.read_text()
    assert sound in text, "the control no longer fits the kernel"
    source.write_text(text.replace(sound, damaged))
    done = check(build(tmp_path / "csrc", only=op), self_test)
    assert done.returncode == 1, done.stdout + done.stderr


def test_launch_limits_and_deadlocks_are_noticed(tmp_path):
    """A launch no device would accept, and a barrier inside a branch that not all threads take."""
    source = tmp_path / "program.cpp"
    source.write_text(
        """
        #include "platform.h"
        #include "launch.cuh"
        #include <cstdio>
        __global__ void nothing() {}
        __global__ void half_a_barrier() {
          if (threadIdx.x < 5) __syncthreads();
          else __syncwarp();
        }
        template <class F> bool throws(F f) {
          try { f(); } catch (const std::runtime_error& e) { std::puts(e.what()); return true; }
          return false;
        }
        int main() {
          using namespace ef;
          const bool sound = !throws([] { launch("sound", nothing, 2, 64, 1024, Cuda{}); });
          const bool threads = throws([] { launch("threads", nothing, 1, 1025, 0, Cuda{}); });
          const bool shared = throws([] { launch("shared", nothing, 1, 32, 300 << 10, Cuda{}); });
          const bool grid = throws([] { launch("grid", nothing, dim3(1, 70000), 32, 0, Cuda{}); });
          const bool deadlock = throws([] { launch("deadlock", half_a_barrier, 1, 32, 0, Cuda{}); });
          return sound && threads && shared && grid && deadlock ? 0 : 1;
        }
        """
    )
    program = tmp_path / "program"
    includes = [f"-I{ROOT / 'csrc/common'}", f"-I{ROOT / 'tests/emulation'}"]
    subprocess.run(["g++", "-std=c++20", "-DEF_EMULATE_CUDA", *includes, str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
