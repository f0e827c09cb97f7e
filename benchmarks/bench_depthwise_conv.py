"""Depthwise convolutions of EfficientNet-B0 at 512 and of the detection heads, over one level or all, and a separable one."""

from functools import partial

import torch

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

OP = "depthwise_conv"

# channels, kernel, stride, input size; the widest openings first
BACKBONE = [
    (240, 5, 1, 64),
    (480, 3, 1, 32),
    (96, 3, 2, 256),
    (672, 5, 1, 32),
    (144, 3, 1, 128),
    (144, 5, 2, 128),
    (240, 3, 2, 64),
    (672, 5, 2, 32),
    (1152, 5, 1, 16),
    (1152, 3, 1, 16),
    (32, 3, 1, 256),
    (480, 5, 1, 32),
]
ON_CPU = 4  # how many of them a run on a CPU measures
PYRAMID = (64, 32, 16, 8, 4)  # sizes of EfficientDet-D0's levels at 512


def cases(device_type: str) -> list[Case]:
    on_gpu = device_type == "cuda"
    batch = 64 if on_gpu else 4
    layouts = (CHANNELS_LAST, CONTIGUOUS)
    chosen = []
    for channels, kernel, stride, size in BACKBONE if on_gpu else BACKBONE[:ON_CPU]:
        name = f"{kernel}x{kernel} stride {stride}, {batch} x {channels} x {size}^2"
        shape = dict(batch=batch, channels=channels, kernel=kernel, stride=stride, size=size)
        chosen.append(Case(name, partial(depthwise, **shape, prologue=None), layouts))
    head = dict(batch=batch, channels=64, size=64)
    chosen[1:1] = [
        Case(
            f"SiLU + 3x3, {batch} x 64 x 64^2",
            partial(depthwise, **head, kernel=3, stride=1, prologue="silu"),
            layouts,
        ),
        # Only this one: PyTorch has a kernel of its own for depthwise convolutions of float32.
        Case(f"SiLU + separable 3x3, {batch} x 64 x 64^2", partial(separable, **head), layouts, convolves=True),
        Case(
            f"3x3 over all levels, {batch} x 64 x 64^2 to 4^2",
            partial(levels, batch=batch, channels=64, sizes=PYRAMID),
            (CHANNELS_LAST,),
        ),
    ]
    if on_gpu:  # where launches decide
        small = partial(levels, batch=16, channels=64, sizes=PYRAMID[2:])
        chosen.append(Case("3x3 over P5 to P7, 16 x 64 x 16^2 to 4^2", small, (CHANNELS_LAST,)))
    return chosen


def depthwise(device, dtype, layout, *, batch: int, channels: int, kernel: int, stride: int, size: int, prologue):
    x = feature_map((batch, channels, size, size), device, dtype, layout)
    weight = filters((channels, 1, kernel, kernel), device, dtype)

    def reference(x, weight):
        return ops.depthwise_conv2d_reference(x, weight, None, stride, "same", prologue=prologue)

    def ours():
        return ops.depthwise_conv2d(x, weight, None, stride, "same", prologue=prologue)

    workload = all_implementations(ours, reference, (x, weight), x.numel(), batch * channels * (size // stride) ** 2)
    if device.type == "cpu" and stride == 1 and prologue is None:  # eager does not always choose it
        workload.peers.append(Implementation("oneDNN", partial(onednn, x, weight), (x, weight)))
    return workload


def onednn(x, weight):
    """Stride 1, as many rows and columns as before."""
    pad = weight.shape[2] // 2
    return torch.mkldnn_convolution(x, weight, None, (pad, pad), (1, 1), (1, 1), x.shape[1])


def levels(device, dtype, layout, *, batch: int, channels: int, sizes: tuple[int, ...]) -> Workload:
    """One filter over all levels; the peers convolve one after the other."""
    xs = tuple(feature_map((batch, channels, size, size), device, dtype, layout) for size in sizes)
    weight = filters((channels, 1, 3, 3), device, dtype)

    def reference(weight, *xs):
        return tuple(ops.depthwise_conv2d_levels_reference(xs, weight, padding="same"))

    def ours():
        return tuple(ops.depthwise_conv2d_levels(xs, weight, padding="same"))

    elements = sum(x.numel() for x in xs)
    workload = all_implementations(ours, reference, (weight, *xs), elements, elements)
    if device.type == "cpu":
        one_by_one = Implementation("oneDNN", lambda: tuple(onednn(x, weight) for x in xs), (weight, *xs))
        workload.peers.append(one_by_one)
    return workload


def separable(device, dtype, layout, *, batch: int, channels: int, size: int) -> Workload:
    x = feature_map((batch, channels, size, size), device, dtype, layout)
    weights = filters((channels, 1, 3, 3), device, dtype), filters((channels, channels, 1, 1), device, dtype)
    bias = torch.randn(channels, device=device).to(dtype).requires_grad_()

    def reference(x, depthwise_weight, pointwise_weight, bias):
        return ops.depthwise_separable_conv2d_reference(
            x, depthwise_weight, pointwise_weight, bias, 1, "same", prologue="silu"
        )

    def ours():
        return ops.depthwise_separable_conv2d(x, *weights, bias, 1, "same", prologue="silu")

    return all_implementations(ours, reference, (x, *weights, bias), x.numel(), x.numel())


def all_implementations(ours, reference, leaves, read: int, written: int) -> Workload:
    """The reference is also how one would write it in PyTorch: activation, padding where asymmetric, grouped convolution.

    `read` and `written` are the elements of the inputs and of the outputs.
    """
    exact = tuple(oracle_copy(leaf) for leaf in leaves)
    size = leaves[0].element_size()
    read, written = read * size, written * size
    return Workload(
        ours=Implementation(OURS, ours, leaves),
        oracle=Implementation("float64", lambda: reference(*exact), exact),
        bytes={FORWARD: read + written, BACKWARD: 2 * read + written, BOTH: 3 * read + 2 * written},
        peers=[
            Implementation("eager", partial(reference, *leaves), leaves),
            Implementation("torch.compile", partial(compiled(reference), *leaves), leaves),
        ],
    )


def feature_map(shape, device, dtype, layout) -> torch.Tensor:
    memory_format = torch.channels_last if layout == CHANNELS_LAST else torch.contiguous_format
    x = torch.randn(shape, device=device, dtype=torch.float32).to(dtype)
    return x.contiguous(memory_format=memory_format).requires_grad_()


def filters(shape, device, dtype) -> torch.Tensor:
    """Scaled so that outputs are about as large as inputs."""
    fan_in = shape[1] * shape[2] * shape[3]
    return torch.randn(shape, device=device).mul_(fan_in**-0.5).to(dtype).requires_grad_()
