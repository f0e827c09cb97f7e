"""Every raw operator survives every tensor that PyTorch can hand it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ops import raw_ops

ROOT = Path(__file__).resolve().parents[2]


def run(backend: str, cases: int, seed: int) -> None:
    command = [sys.executable, "-m", "tests.ops.raw_ops", backend, str(cases), "--seed", str(seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize("backend", ["cpu", "emulated"])
def test_strange_arguments_give_the_bits_of_clones_or_an_error(backend):
    run(backend, 2000, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu", "emulated"])
@pytest.mark.parametrize("seed", range(1, 6))
def test_many_strange_arguments(backend, seed):
    run(backend, 20000, seed)


class Damaged:
    """An operator that does something else than the one it stands for."""

    def __init__(self, op, behave):
        self._schema, self.behave, self.op = op._schema, behave, op

    def __call__(self, *arguments):
        return self.behave(self.op, *arguments)


def _writes_behind_its_input(op, x, *rest):
    torch.as_strided(x, (x.numel() + 1,), (1,))[-1] = 0
    return op(x, *rest)


def _writes_its_input(op, x, *rest):
    y = op(x, *rest)
    x.add_(1)
    return y


def _ignores_strides(op, x, *rest):
    return op(torch.as_strided(x, x.shape, torch.empty(x.shape).stride()), *rest)


@pytest.mark.parametrize("behave", [_writes_behind_its_input, _writes_its_input, _ignores_strides])
def test_the_check_sees_an_operator_that_misbehaves(behave):
    x, arguments = torch.randn(2, 3, 4, 4)[:, :, :, ::2], (False,)
    op = torch.ops.effdet_fast.batch_norm_stats.default
    assert raw_ops.check_call(op, (x.contiguous(), *arguments))
    with pytest.raises(raw_ops.Wrong):
        raw_ops.check_call(Damaged(op, behave), (x if behave is _ignores_strides else x.contiguous(), *arguments))


def test_an_index_out_of_range_raises(native_backend):
    boxes, scores = torch.rand(1, 4, 4, device=native_backend.device), torch.rand(1, 4, device=native_backend.device)
    order = torch.tensor([[0, 1, 2, 4]], device=native_backend.device)
    labels = torch.zeros_like(order)

    def call():
        return torch.ops.effdet_fast.nms_padded(boxes, scores, order, labels, 2.0, None, 4)

    if native_backend.name == "cpu":
        with pytest.raises(RuntimeError, match=r"order must hold indices of boxes, in \[0, 4\)"):
            call()
    else:  # to look would wait for the device: it takes no part
        found = call()
        assert found[4].tolist() == [3] and found[3].tolist() == [[0, 1, 2, -1]]


def test_errors_carry_no_path_of_the_build():
    with pytest.raises(RuntimeError) as refused:
        torch.ops.effdet_fast.batch_norm_stats(torch.zeros(3), False)
    assert "csrc/batch_norm_act/batch_norm_act.cpp" in str(refused.value) and str(ROOT) not in str(refused.value)
    library = (ROOT / "effdet_fast/kernels_cpu.so").read_bytes()
    assert str(ROOT).encode() not in library and str(Path(torch.__file__).parent).encode() not in library
