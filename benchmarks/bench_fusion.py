"""One BiFPN node: resample the inputs, weigh, sum, SiLU. Sizes of EfficientDet-D0 at 512 (and D4 at 1024 on a GPU)."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

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
    optional,
    oracle_copy,
)
from effdet_fast import ops

OP = "fusion"
TOP_DOWN = ("none", "nearest")
BOTTOM_UP = ("none", "none", "max_pool")
SCALE = {"none": 1.0, "nearest": 0.5, "max_pool": 2.0}  # input size over output size


def cases(device_type: str) -> list[Case]:
    def case(name: str, batch: int, channels: int, size: int, resample: tuple[str, ...]) -> Case:
        build = partial(node, batch=batch, channels=channels, size=size, resample=resample)
        return Case(f"{name}, {batch} x {channels} x {size}^2", build, (CHANNELS_LAST, CONTIGUOUS))

    batch = 64 if device_type == "cuda" else 4
    chosen = [
        case("top-down P3 (1 nearest of 2)", batch, 64, 64, TOP_DOWN),
        case("bottom-up P4 (1 max-pool of 3)", batch, 64, 32, BOTTOM_UP),
    ]
    if device_type == "cuda":
        chosen += [
            case("D4 top-down P3 (1 nearest of 2)", 16, 224, 128, TOP_DOWN),
            case("D4 bottom-up P4 (1 max-pool of 3)", 16, 224, 64, BOTTOM_UP),
            case("bottom-up P6 (1 max-pool of 3)", 16, 64, 8, BOTTOM_UP),
        ]
    return chosen


def node(device, dtype, layout, *, batch: int, channels: int, size: int, resample: Sequence[str]) -> Workload:
    memory_format = torch.channels_last if layout == CHANNELS_LAST else torch.contiguous_format

    def feature_map(how: str) -> Tensor:
        side = int(size * SCALE[how])
        x = torch.randn(batch, channels, side, side, device=device, dtype=torch.float32)
        return x.to(dtype).contiguous(memory_format=memory_format).requires_grad_()

    inputs = [feature_map(how) for how in resample]
    weights = (torch.rand(len(inputs), device=device) + 0.5).requires_grad_()
    leaves = (*inputs, weights)
    exact = [oracle_copy(x) for x in leaves]

    def reference(*leaves: Tensor) -> Tensor:
        return ops.weighted_fusion_reference(list(leaves[:-1]), leaves[-1], resample=resample, activation="silu")

    def eager(*leaves: Tensor) -> Tensor:
        return plain_fusion(leaves[:-1], leaves[-1], resample)

    absent: dict[str, str] = {}
    functions = {"eager": eager, "torch.compile": compiled(eager)}
    peers = [Implementation(name, partial(function, *leaves), leaves) for name, function in functions.items()]
    if effdet := optional("effdet.efficientdet", absent):
        combine = effdet_node(effdet, inputs, weights, resample, size)

        def of_effdet() -> Tensor:
            return F.silu(combine(inputs))

        effdet_leaves = (*inputs, combine.edge_weights)
        peers += [
            Implementation("effdet", of_effdet, effdet_leaves),
            Implementation("effdet, compiled", compiled(of_effdet), effdet_leaves),
        ]

    output = inputs[0].numel() * inputs[0].element_size()
    read = sum(x.numel() * x.element_size() for x in inputs)
    forward, backward = (
        read + output,
        output + 2 * read,
    )  # backward: its gradient and the inputs in, their gradients out
    return Workload(
        ours=Implementation(
            OURS, lambda: ops.weighted_fusion(inputs, weights, resample=resample, activation="silu"), leaves
        ),
        oracle=Implementation("float64", lambda: reference(*exact), tuple(exact)),
        bytes={FORWARD: forward, BACKWARD: backward, BOTH: forward + backward},
        peers=peers,
        absent=absent,
    )


def plain_fusion(inputs: Sequence[Tensor], weights: Tensor, resample: Sequence[str]) -> Tensor:
    """As one would write it in PyTorch, in the dtype of the inputs; for even sizes."""
    positive = F.relu(weights)
    shares = (positive / (positive.sum() + 1e-4)).to(inputs[0].dtype)
    terms = []
    for i, (x, how) in enumerate(zip(inputs, resample, strict=True)):
        if how == "nearest":
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        elif how == "max_pool":
            x = F.max_pool2d(x, 3, 2, ceil_mode=True)
        terms.append(shares[i] * x)
    return F.silu(sum(terms[1:], terms[0]))


def effdet_node(effdet, inputs: Sequence[Tensor], weights: Tensor, resample: Sequence[str], size: int):
    combine = effdet.FpnCombine(
        [dict(num_chs=x.shape[1], size=tuple(x.shape[2:])) for x in inputs],
        inputs[0].shape[1],
        list(range(len(inputs))),
        (size, size),
        pad_type="same",
        downsample="max",
        upsample="nearest",
        weight_method="fastattn",
    ).to(weights.device)
    with torch.no_grad():
        combine.edge_weights.copy_(weights)
    return combine
