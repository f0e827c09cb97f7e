"""What can be done to the arguments of a raw operator that nobody should do."""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

GUARD = 64  # bytes on each side of an argument; a multiple of every vector's size


def place(x: Tensor, strides: tuple[int, ...] | None = None, shift: int = 0) -> tuple[Tensor, Tensor]:
    """The values of x in the middle of memory of its own, `shift` elements on; and all of that memory, as bytes."""
    strides = x.stride() if strides is None else strides
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True)) if x.numel() else 0
    memory = torch.full((2 * GUARD + (extent + shift) * x.element_size(),), 0xA5, dtype=torch.uint8)
    whole = memory[GUARD:].view(torch.uint8)[: (extent + shift) * x.element_size()].view(x.dtype)
    placed = whole.as_strided(x.shape, strides, whole.storage_offset() + shift)
    return placed.copy_(x) if x.numel() else placed, memory


def dense_strides(x: Tensor) -> tuple[int, ...]:
    """Of a dense tensor of x's sizes, in the order of x's dimensions in memory."""
    return torch.empty_like(x).stride() if x.numel() else torch.empty(x.shape).stride()


# What can be done to a tensor. Each keeps its values or takes others; none keeps its memory.
def expanded(rng: random.Random, x: Tensor) -> Tensor:
    sizes = [1 if rng.random() < 0.5 else size for size in x.shape]
    return x[tuple(slice(0, size) for size in sizes)].clone().expand(x.shape)


def offset(rng: random.Random, x: Tensor) -> Tensor:
    return place(x, shift=rng.choice((1, 2, 3)))[0]


def sliced(rng: random.Random, x: Tensor) -> Tensor:
    if x.dim() == 0:
        return torch.stack([x, x])[1]
    axis = rng.randrange(x.dim())
    doubled = torch.cat([x, x], axis)
    return doubled.narrow(axis, rng.choice((0, x.shape[axis])), x.shape[axis])


def stepped(rng: random.Random, x: Tensor) -> Tensor:
    return torch.stack([x, x], -1)[..., rng.choice((0, 1))]


def permuted(rng: random.Random, x: Tensor) -> Tensor:
    order = rng.sample(range(x.dim()), x.dim())
    return x.permute(order).contiguous().permute([order.index(i) for i in range(x.dim())])


def zeros_without_memory(rng: random.Random, x: Tensor) -> Tensor:
    return torch._efficientzerotensor(x.shape, dtype=x.dtype)


def negative_view(rng: random.Random, x: Tensor) -> Tensor:
    return torch._neg_view(x.clone())


def conjugate(rng: random.Random, x: Tensor) -> Tensor:
    return torch.complex(x.float(), x.float()).conj()


def imaginary(rng: random.Random, x: Tensor) -> Tensor:
    return torch.complex(x.float(), x.float()).conj().imag


def sparse(rng: random.Random, x: Tensor) -> Tensor:
    return x.to_sparse()


def meta(rng: random.Random, x: Tensor) -> Tensor:
    return x.to("meta")


def other_dtype(rng: random.Random, x: Tensor) -> Tensor:
    return x.to(
        rng.choice([torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool])
    )


def empty(rng: random.Random, x: Tensor) -> Tensor:
    axis = rng.randrange(x.dim()) if x.dim() else 0
    return x.reshape(1)[:0] if x.dim() == 0 else x.narrow(axis, 0, 0).clone()


def shorter(rng: random.Random, x: Tensor) -> Tensor:
    axis = rng.randrange(x.dim()) if x.dim() else 0
    return x.reshape(1)[:0] if x.dim() == 0 else x.narrow(axis, 0, max(x.shape[axis] - 1, 0)).clone()


def longer(rng: random.Random, x: Tensor) -> Tensor:
    axis = rng.randrange(x.dim()) if x.dim() else 0
    return torch.stack([x, x]) if x.dim() == 0 else torch.cat([x, x.narrow(axis, 0, min(1, x.shape[axis]))], axis)


def other_rank(rng: random.Random, x: Tensor) -> Tensor:
    return rng.choice(
        (x.flatten(), x.unsqueeze(0), x.reshape(-1)[:1].squeeze()) if x.numel() else (x.flatten(), x.unsqueeze(0))
    )


def other_values(rng: random.Random, x: Tensor) -> Tensor:
    y = x.clone()
    if x.numel() == 0:
        return y
    special: list[Any] = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e30, -1e30, 1e-40]
    if not x.is_floating_point():
        limits = torch.iinfo(x.dtype) if x.dtype != torch.bool else None
        special = [limits.min, limits.max, 0, 1, max(limits.min, -3), 8, 100] if limits else [False, True]
    flat = y.reshape(-1) if y.is_contiguous() else y.permute(0, 2, 3, 1).reshape(-1) if y.dim() == 4 else y.flatten()
    for _ in range(rng.choice((1, 1, 5, y.numel()))):
        value = rng.choice(special)
        if x.dtype == torch.float16 and abs(value) == 1e30:
            value = 6e4
        flat[rng.randrange(len(flat))] = value
    return y


def freed(rng: random.Random, x: Tensor) -> Tensor:
    y = x.clone()
    y.untyped_storage().resize_(rng.choice((0, y.untyped_storage().nbytes() // 2)))
    return y


def misaligned(rng: random.Random, x: Tensor) -> Tensor:
    data = bytearray(x.numel() * x.element_size() + 1)
    if x.element_size() == 1 or x.numel() == 0:
        return x.clone()
    return torch.frombuffer(data, dtype=x.dtype, offset=1, count=x.numel()).view(x.shape).copy_(x)


TENSORS: list[Callable[[random.Random, Tensor], Tensor]] = [
    expanded, offset, sliced, stepped, permuted, zeros_without_memory, negative_view, conjugate, imaginary, sparse, meta,
    other_dtype, empty, shorter, longer, other_rank, other_values, other_values, freed, misaligned,
]  # fmt: skip
# 2^40 elements are more than any machine gives out; a number between would be given, and filled.
INTEGERS = (-(2**62), -2, -1, 0, 1, 2, 3, 4, 5, 7, 9, 60, 2**40, 2**62)
FLOATS = (float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 0.5, 1e300, 1e-300)


def changed(rng: random.Random, value: Any) -> Any:
    if isinstance(value, Tensor):
        return rng.choice(TENSORS)(rng, value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice(INTEGERS)
    if isinstance(value, float):
        return rng.choice(FLOATS)
    return value


def changed_list(rng: random.Random, values: list) -> list:
    how = rng.choice(("shorter", "longer", "empty", "other order"))
    if how == "shorter":
        return values[:-1]
    if how == "longer":
        return [*values, *values[:1]]
    return [] if how == "empty" else values[::-1]


def mutated(rng: random.Random, arguments: tuple) -> tuple[tuple, str]:
    """The arguments with one or two of them changed, and what was done."""
    result, said = list(arguments), []
    for i in rng.sample(range(len(result)), min(rng.choice((0, 1, 1, 1, 2)), len(result))):
        value = result[i]
        if isinstance(value, list | tuple) and value and rng.random() < 0.7:
            k = rng.randrange(len(value))
            result[i] = [changed(rng, v) if j == k else v for j, v in enumerate(value)]
        elif isinstance(value, list | tuple):
            result[i] = changed_list(rng, list(value))
        elif value is not None and rng.random() < 0.05:
            result[i] = None
        else:
            result[i] = changed(rng, value)
        said.append(f"{i}: {describe(value)} -> {describe(result[i])}")
    return tuple(result), "; ".join(said)


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        strides = value.stride() if value.layout == torch.strided else value.layout
        return f"{value.dtype}{list(value.shape)}/{strides}@{value.device.type}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(describe, value))}]"
    return repr(value)
