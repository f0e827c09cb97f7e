"""Squeeze-and-excite behind the depthwise convolutions of EfficientNet-B0 at 512."""

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

OP = "squeeze_excite"

# channels, size, channels between the convolutions; the first block of each stage
BACKBONE = [(32, 256, 8), (96, 128, 4), (240, 64, 10), (672, 32, 28), (1152, 16, 48)]


def cases(device_type: str) -> list[Case]:
    batch = 64 if device_type == "cuda" else 4
    return [
        Case(
            f"{batch} x {channels} x {size}^2",
            partial(excite, batch=batch, channels=channels, size=size, squeezed=squeezed),
            (CHANNELS_LAST, CONTIGUOUS),
            convolves=True,
        )
        for channels, size, squeezed in BACKBONE
    ]


def eager(x: Tensor, reduce_weight: Tensor, reduce_bias: Tensor, expand_weight: Tensor, expand_bias: Tensor) -> Tensor:
    reduced = F.conv2d(x.mean((2, 3), keepdim=True), reduce_weight.to(x.dtype), reduce_bias.to(x.dtype))
    return x * F.conv2d(F.silu(reduced), expand_weight.to(x.dtype), expand_bias.to(x.dtype)).sigmoid()


def excite(device, dtype, layout, *, batch: int, channels: int, size: int, squeezed: int) -> Workload:
    memory_format = torch.channels_last if layout == CHANNELS_LAST else torch.contiguous_format
    x = torch.randn(batch, channels, size, size, device=device) + 0.5
    x = x.to(dtype).contiguous(memory_format=memory_format).requires_grad_()
    shapes = ((squeezed, channels, 1, 1), (squeezed,), (channels, squeezed, 1, 1), (channels,))
    weights = [torch.randn(shape, device=device) / shape[-3 if len(shape) == 4 else 0] ** 0.5 for shape in shapes]
    leaves = (x, *(weight.requires_grad_() for weight in weights))
    exact = tuple(oracle_copy(leaf) for leaf in leaves)
    absent: dict[str, str] = {}
    peers = [
        Implementation("eager", partial(eager, *leaves), leaves),
        Implementation("torch.compile", partial(compiled(eager), *leaves), leaves),
    ]
    blocks = optional("timm.models._efficientnet_blocks", absent)
    if blocks is not None and dtype == torch.float32:  # its parameters have the dtype of x
        module = blocks.SqueezeExcite(channels, rd_channels=squeezed, act_layer=torch.nn.SiLU).to(device)
        parameters = dict(zip((name for name, _ in module.named_parameters()), leaves[1:], strict=True))
        peers.append(
            Implementation("timm", lambda: torch.func.functional_call(module, parameters, (x,), strict=True), leaves)
        )
    tensor = x.numel() * x.element_size()
    return Workload(
        ours=Implementation(OURS, partial(ops.squeeze_excite, *leaves), leaves),
        oracle=Implementation("float64", partial(eager, *exact), exact),
        bytes={FORWARD: 3 * tensor, BACKWARD: 4 * tensor, BOTH: 7 * tensor},
        peers=peers,
        absent=absent,
    )
