"""Training-mode BatchNorm and SiLU on the feature maps of EfficientNet-B0 at 512, and the eval-mode form."""

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.workload import (
    BACKWARD,
    BOTH,
    CHANNELS_LAST,
    CONTIGUOUS,
    FORWARD,
    OURS,
    Case,
    Implementation,
    Workload,
    compiled,
    oracle_copy,
)
from effdet_fast import ops

OP = "batch_norm_act"
EPS = 1e-3

# channels, size: behind the expansions and depthwise convolutions; the most common sizes first
BACKBONE = [(240, 64), (144, 128), (672, 32), (1152, 16), (96, 128), (480, 32), (32, 256), (96, 256)]
ON_CPU = 5  # how many of them a run on a CPU measures


def cases(device_type: str) -> list[Case]:
    on_gpu = device_type == "cuda"
    batch = 64 if on_gpu else 4
    layouts = (CHANNELS_LAST, CONTIGUOUS)
    chosen = [
        Case(
            f"SiLU, {batch} x {channels} x {size}^2",
            partial(norm, batch=batch, channels=channels, size=size, activation="silu"),
            layouts,
        )
        for channels, size in (BACKBONE if on_gpu else BACKBONE[:ON_CPU])
    ]
    head = partial(norm, batch=batch, channels=64, size=64)
    return [
        *chosen,
        Case(f"alone, {batch} x 64 x 64^2", partial(head, activation=None), layouts),
        Case(f"SiLU, eval, {batch} x 64 x 64^2", partial(head, activation="silu", training=False), layouts),
    ]


def norm(device, dtype, layout, *, batch: int, channels: int, size: int, activation, training: bool = True) -> Workload:
    memory_format = torch.channels_last if layout == CHANNELS_LAST else torch.contiguous_format
    x = torch.randn(batch, channels, size, size, device=device) * 2 + 0.5
    x = x.to(dtype).contiguous(memory_format=memory_format).requires_grad_()
    weight = (torch.rand(channels, device=device) + 0.5).requires_grad_()
    bias = torch.randn(channels, device=device).requires_grad_()
    mean, var = torch.full((channels,), 0.5, device=device), torch.full((channels,), 4.0, device=device)
    leaves = (x, weight, bias)
    exact = tuple(oracle_copy(leaf) for leaf in leaves)
    peer_running = (mean.clone(), var.clone())

    def ours():
        return ops.batch_norm_act(x, mean, var, weight, bias, training, 0.0, EPS, activation=activation)

    def pytorch(x, weight, bias):
        y = F.batch_norm(x, *peer_running, weight, bias, training, 0.0, EPS)
        return F.silu(y) if activation else y

    def oracle():
        exact_x, exact_weight, exact_bias = exact
        y = F.batch_norm(exact_x, mean.double(), var.double(), exact_weight, exact_bias, training, 0.0, EPS)
        return F.silu(y) if activation else y

    tensor = x.numel() * x.element_size()
    reads = 2 if training else 1
    forward, backward = (reads + 1) * tensor, 5 * tensor  # weight and bias want their sums first, in eval mode too
    return Workload(
        ours=Implementation(OURS, ours, leaves),
        oracle=Implementation("float64", oracle, exact),
        bytes={FORWARD: forward, BACKWARD: backward, BOTH: forward + backward},
        peers=[
            Implementation("eager", partial(pytorch, *leaves), leaves),
            Implementation("torch.compile", partial(compiled(pytorch), *leaves), leaves),
        ],
    )
