"""What two processes compute together; run by torchrun from `test_batch_norm_act_module.py`, writes `rank<N>.json`.

torchrun --nproc-per-node 2 -m tests.ops.shared_batch_norm FOLDER
"""

import gc
import hashlib
import json
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from effdet_fast import ops
from effdet_fast.nn import BatchNormAct2d, synchronize_batch_norm

# Images of each process, dtype, and whether the reference runs.
CASES = {
    "even": ([2, 2], torch.float32, False),
    "uneven": ([1, 3], torch.float32, False),
    "one empty": ([0, 3], torch.float32, False),
    "reference": ([1, 2], torch.float32, True),
    "bfloat16": ([2, 1], torch.bfloat16, False),
}


def make_module(kind, **options):
    module = kind(5, eps=1e-3, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        module.weight.copy_(torch.rand(5, generator=generator) + 0.5)
        module.bias.copy_(torch.randn(5, generator=generator))
    return module


def relative(mine: torch.Tensor, wanted: torch.Tensor) -> float:
    difference = (mine.double() - wanted.double()).abs()
    return float(difference.max() / (wanted.abs().max() + 1e-6)) if difference.numel() else 0.0


def check(rank: int, images: list[int], dtype: torch.dtype, reference: bool) -> tuple[dict[str, float], str]:
    generator = torch.Generator().manual_seed(2)
    x, grad = (torch.randn(sum(images), 5, 4, 3, generator=generator).to(dtype) for _ in range(2))
    x = (x * 2 + torch.arange(len(x)).view(-1, 1, 1, 1)).to(dtype)  # every image has a mean of its own
    mine = slice(0, images[0]) if rank == 0 else slice(images[0], None)

    joint = make_module(nn.BatchNorm2d).double()
    whole = x.double().requires_grad_()
    expected = F.silu(joint(whole))
    expected.backward(grad.double())

    module = synchronize_batch_norm(make_module(BatchNormAct2d, activation="silu"))
    part = x[mine].contiguous(memory_format=torch.channels_last).requires_grad_()
    with ops.use_reference() if reference else nullcontext():
        y = module(part)
        y.backward(grad[mine])
    for parameter in module.parameters():
        dist.all_reduce(parameter.grad)
    digest = hashlib.sha256(b"".join(b.numpy().tobytes() for b in module.buffers())).hexdigest()
    return {
        "y": relative(y.detach(), expected.detach()[mine]),
        "grad_x": relative(part.grad, whole.grad[mine]),
        "grad_weight": relative(module.weight.grad, joint.weight.grad),
        "grad_bias": relative(module.bias.grad, joint.bias.grad),
        "running_mean": relative(module.running_mean, joint.running_mean),
        "running_var": relative(module.running_var, joint.running_var),
    }, digest


def second_derivative() -> str:
    x = torch.randn(2, 5, 3, 3, requires_grad=True)
    y = synchronize_batch_norm(make_module(BatchNormAct2d, activation="silu"))(x)
    try:
        torch.autograd.grad(y.sum(), x, create_graph=True)
    except RuntimeError as error:
        return str(error)
    return "no error"


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    report: dict = {"digests": []}
    for name, case in CASES.items():
        report[name], digest = check(rank, *case)
        report["digests"].append(digest)
    report["second derivative"] = second_derivative()
    (folder / f"rank{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()
    gc.collect()  # ends the group's threads, which must not need the interpreter while that ends


if __name__ == "__main__":
    main(Path(sys.argv[1]))
