"""The emulation notices what it is there to notice: each test damages a kernel and asserts that the checks fail.

Here the kernels of a network, and the emulation itself; those that make detections have a file of their own, for another core.
"""

import subprocess

import pytest

from tests.emulation.build import INCLUDE, ROOT, build
from tests.emulation.damage import assert_noticed, check, parameters

# (op, self-test, file, the text to damage, what it becomes)
DAMAGES = [
    ("focal_loss", "sigmoid_focal_loss", "focal_loss_vector.cuh", "column = 0, ++row", "column = 1, ++row"),
    ("focal_loss", "sigmoid_focal_loss", "focal_loss_vector.cuh", "at.column + kVec > classes", "at.column > classes"),
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
        "level.first_anchor, first, p.classes);",
        "level.first_anchor, first + 1, p.classes);",
    ),
    (
        "detection_loss",
        "detection_loss",
        "detection_loss_kernel.cuh",
        "(pixel + k) * p.per_cell + anchor]",
        "(pixel + k) * p.per_cell]",
    ),
    # Another child's gradient; another input's vectors; the wrong rows; an owned tap; a part of a sum; a tap's number; a sum.
    (
        "fusion",
        "weighted_fusion",
        "fusion_kernel.cuh",
        "unpacked<kVec, scalar_t>(grads[j])",
        "unpacked<kVec, scalar_t>(grads[0])",
    ),
    ("fusion", "weighted_fusion", "fusion_kernel.cuh", "p.inputs[i].x + at[j]", "p.inputs[0].x + at[j]"),
    ("fusion", "weighted_fusion", "fusion_max_pool.cuh", "top + 2 < in.h ? in.w * c : 0", "0"),
    ("fusion", "weighted_fusion", "fusion_max_pool.cuh", "y >= up && x >= left", "y >= up && x > left"),
    ("fusion", "weighted_fusion", "fusion_kernel.cuh", "dots[kLastInput] +=", "dots[kLastInput] ="),
    ("fusion", "weighted_fusion", "fusion_words.h", "(3 * row + 2) * kOnes<T>", "(3 * row + 1) * kOnes<T>"),
    (
        "fusion",
        "weighted_fusion",
        "fusion_any_kernel.cuh",
        "parent_sum.v[k] += grad.v[k]",
        "parent_sum.v[k] = grad.v[k]",
    ),
    (
        "depthwise_conv",
        "depthwise_conv2d",
        "depthwise_conv_grad_weight_kernel.cuh",
        "iy = oy * kStride - s.top;",
        "iy = oy * kStride - s.top + 1;",
    ),
    (
        "depthwise_conv",
        "depthwise_conv2d",
        "depthwise_conv_grad_weight_kernel.cuh",
        "g[(i - a + kRows) % kRows]",
        "g[i]",
    ),
    (
        "depthwise_conv",
        "depthwise_conv2d_levels",
        "depthwise_conv_grad_weight_kernel.cuh",
        "(blockIdx.y - of.first_block) * of.chunk_tiles",
        "blockIdx.y * of.chunk_tiles",
    ),
    (
        "depthwise_conv",
        "depthwise_conv2d",
        "depthwise_conv_rows.cuh",
        "i < pairs * kTaps ? i : i - pairs * kTaps",
        "min(i, pairs * kTaps - 1)",
    ),
    (
        "depthwise_conv",
        "depthwise_conv2d_levels",
        "depthwise_conv_kernel.cuh",
        "(blockIdx.x - of.first_block) * kThreads",
        "blockIdx.x * kThreads",
    ),
    (
        "depthwise_conv",
        "depthwise_conv2d",
        "depthwise_conv_grad_weight_kernel.cuh",
        "(c + v) * kTaps + t",
        "c * kTaps + t",
    ),
    ("batch_norm_act", "batch_norm_act", "../common/row_sums.cuh", "r < rows; ++r", "r + 1 < rows; ++r"),
    ("batch_norm_act", "batch_norm_act", "../common/vector_walk.cuh", "load(i + kBatch * walk.stride)", "load(i)"),
    (
        "batch_norm_act",
        "batch_norm_act",
        "batch_norm_act_kernel.cuh",
        "threadIdx.x / kWarpSize;",
        "threadIdx.x / kWarpSize + 1;",
    ),
    (
        "squeeze_excite",
        "squeeze_excite",
        "../common/row_sums.cuh",
        "i < width * kFours",
        "i + 1 < width * kFours",
    ),
    (
        "squeeze_excite",
        "squeeze_excite",
        "squeeze_excite_kernel.cuh",
        "i = threadIdx.y; i < chunks",
        "i = threadIdx.y + 1; i < chunks",
    ),
    (
        "squeeze_excite",
        "squeeze_excite",
        "squeeze_excite_gates_kernel.cuh",
        "share < kGateWarps; ++share",
        "share + 1 < kGateWarps; ++share",
    ),
]


def test_the_sound_kernels_pass():
    """As they are built for the damages: what a self-test needed beyond float32 would fail here."""
    done = check(build(only_float32=True))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "missing, op, self_test",
    [("BARRIERS", "focal_loss", "sigmoid_focal_loss"), ("FENCES", "depthwise_conv", "depthwise_conv2d")],
)
def test_what_holds_threads_together_is_missed(missing, op, self_test):
    library = build(defines=(f"EF_EMULATION_WITHOUT_{missing}",), only=op, only_float32=True)
    done = check(library, self_test)
    assert done.returncode == 1, done.stdout + done.stderr


@pytest.mark.parametrize("damage", parameters(DAMAGES))
def test_a_damaged_kernel_is_noticed(tmp_path, damage):
    assert_noticed(tmp_path, *damage)


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
    includes = [f"-I{ROOT / 'csrc/common'}", f"-I{ROOT / 'tests/emulation'}", f"-I{INCLUDE}"]
    subprocess.run(["g++", "-std=c++20", "-DEF_EMULATE_CUDA", *includes, str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
