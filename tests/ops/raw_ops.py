"""Calls of every raw operator with tensors and numbers that nobody should hand it, in a process of its own.

python -m tests.ops.raw_ops BACKEND CASES [--seed N] [--library EMULATED.so] [--only-float32]

Valid calls are recorded below the public functions; each case changes one or two of a call's arguments. What comes out has the
bits of the same operator on contiguous clones, or is an exception. Memory around and in the arguments is left as it was. A case
that kills the process is the last line of the output.
"""

import argparse
import contextlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from effdet_fast import ops

GUARD = 64  # bytes on each side of an argument; a multiple of every vector's size
Call = tuple[torch._ops.OpOverload, tuple]


class Recorder(TorchDispatchMode):
    """Keeps the calls of our raw operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "effdet_fast":
            self.calls.append((func, tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, args)))
        return func(*args, **(kwargs or {}))


class Valid:
    """Valid calls of the public functions, on tensors of a few elements; the numbers come from `rng`."""

    def __init__(self, rng: random.Random, dtypes: list[torch.dtype]):
        self.rng, self.dtypes = rng, dtypes

    def record(self) -> list[Call]:
        makers = [
            self.focal_loss,
            self.detection_loss,
            self.fusion,
            self.depthwise_conv,
            self.depthwise_conv_levels,
            self.batch_norm,
            self.squeeze_excite,
            self.nms,
            self.nms_padded,
            self.match_anchors,
            self.decode,
        ]
        with Recorder() as recorder:
            for make in makers:
                self.dtype = self.rng.choice(self.dtypes)
                make()
        return recorder.calls

    def size(self, *choices: int) -> int:
        return self.rng.choice(choices or (1, 2, 3, 4, 5, 8, 11))

    def tensor(self, *sizes: int, grad: bool = True) -> Tensor:
        x = torch.randn(sizes).to(self.dtype)
        if len(sizes) == 4 and self.rng.random() < 0.5:
            x = x.to(memory_format=torch.channels_last)
        return x.requires_grad_(grad)

    def floats(self, *sizes: int) -> Tensor:
        return torch.rand(sizes, dtype=torch.float64 if self.dtype == torch.float64 else torch.float32)

    def boxes(self, *sizes: int) -> Tensor:
        start = torch.rand(*sizes, 2) * 20
        return torch.cat([start, start + torch.rand(*sizes, 2) * 10], -1)

    def activation(self) -> str | None:
        return self.rng.choice((None, "silu", "relu", "relu6"))

    def backward(self, y: Tensor, *inputs: Tensor | None) -> None:
        wanted = [x for x in inputs if x is not None]
        torch.autograd.grad(y, wanted, torch.randn_like(y), allow_unused=True)

    def focal_loss(self) -> None:
        sizes = [self.size() for _ in range(self.rng.choice((1, 2, 4)))]
        x = self.tensor(*sizes)
        soft = self.rng.random() < 0.5
        targets = torch.rand(sizes).to(self.dtype) if soft else torch.randint(-2, sizes[-1], sizes[:-1])
        weight = self.rng.choice((None, self.floats(sizes[-1])))
        options = {"gamma": self.rng.choice((0.0, 1.5, 2.0, 3.0)), "class_weight": weight}
        for reduction in ("none", "sum"):
            self.backward(ops.sigmoid_focal_loss(x, targets, reduction=reduction, **options), x)

    def detection_loss(self) -> None:
        images, per_cell, classes = self.size(1, 2), self.size(1, 3), self.size(1, 3, 4, 9)
        sizes = [(self.size(), self.size()) for _ in range(self.size(1, 2))]
        cls = [self.tensor(images, per_cell * classes, *size) for size in sizes]
        box = [self.tensor(images, per_cell * 4, *size) for size in sizes]
        anchors = per_cell * sum(h * w for h, w in sizes)
        labels = torch.randint(-2, classes, (images, anchors))
        codes = self.floats(images, anchors, 4)
        options = {
            "num_classes": classes,
            "box_loss": self.rng.choice(("huber", "l1", "smooth_l1", "giou")),
            "normalizer": self.rng.choice(("batch", "per_image")),
            "anchors": self.boxes(anchors).to(codes.dtype),
            "class_weight": self.rng.choice((None, self.floats(classes))),
        }
        total = ops.detection_loss(cls, box, labels, codes, (labels >= 0).sum(1).to(codes.dtype), **options).total
        for _ in range(2):  # hands its buffers out, then computes anew
            torch.autograd.grad(total, [*cls, *box], torch.tensor(0.5, dtype=total.dtype), retain_graph=True)

    def fusion(self) -> None:
        n, c, h, w = self.size(1, 2), self.size(), self.size(), self.size()
        resample = [self.rng.choice(("none", "nearest", "max_pool")) for _ in range(self.size(2, 3))]
        larger = {"none": (h, w), "nearest": (self.size(), self.size()), "max_pool": (2 * h, 2 * w - 1)}
        inputs = [self.tensor(n, c, *larger[how]) for how in resample]
        method = self.rng.choice(("fast", "softmax", "sum"))
        weights = None if method == "sum" else self.floats(len(inputs)).requires_grad_()
        options = {"method": method, "resample": resample, "size": (h, w), "activation": self.activation()}
        self.backward(ops.weighted_fusion(inputs, weights, **options), *inputs, weights)
        with torch.no_grad():
            ops.weighted_fusion(inputs, weights, **options)

    def depthwise_conv(self) -> None:
        c, k = self.size(), self.size(3, 5)
        x, weight = self.tensor(self.size(1, 2), c, self.size(), self.size()), self.tensor(c, 1, k, k)
        bias = self.rng.choice((None, self.tensor(c)))
        padding = self.rng.choice(("same", k // 2, (k, 0, 1, k)))
        padding = "same" if min(x.shape[2:]) < k else padding
        y = ops.depthwise_conv2d(x, weight, bias, self.size(1, 2), padding, prologue=self.activation())
        self.backward(y, x, weight, bias)

    def depthwise_conv_levels(self) -> None:
        c, k = self.size(), self.size(3, 5)
        xs = [self.tensor(self.size(1, 2), c, self.size(), self.size()) for _ in range(self.size(1, 3))]
        weight, bias = self.tensor(c, 1, k, k), self.rng.choice((None, self.tensor(c)))
        ys = ops.depthwise_conv2d_levels(xs, weight, bias, self.size(1, 2), "same", prologue=self.activation())
        self.backward(torch.cat([y.flatten() for y in ys]), *xs, weight, bias)

    def batch_norm(self) -> None:
        c = self.size()
        x = self.tensor(self.size(2, 3), c, self.size(), self.size())
        weight, bias = (self.rng.choice((None, self.floats(c).requires_grad_())) for _ in range(2))
        for training in (True, False):
            running = (self.floats(c), self.floats(c) + 0.1)
            options = {"training": training, "activation": self.activation()}
            self.backward(ops.batch_norm_act(x, *running, weight, bias, **options), x, weight, bias)
            ones = self.floats(c).requires_grad_()
            self.backward(ops.batch_norm_act(x.detach(), *running, ones, bias, **options), ones)
        channels_last = not x.is_contiguous()
        torch.ops.effdet_fast.batch_norm_stats(x.detach(), channels_last)

    def squeeze_excite(self) -> None:
        c, r = self.size(), self.size()
        x = self.tensor(self.size(1, 2), c, self.size(), self.size())
        weights = (self.floats(r, c, 1, 1), self.floats(r), self.floats(c, r, 1, 1), self.floats(c))
        reduce, reduce_bias, expand, expand_bias = (t.requires_grad_() for t in weights)
        reduce_bias, expand_bias = self.rng.choice((None, reduce_bias)), self.rng.choice((None, expand_bias))
        y = ops.squeeze_excite(x, reduce, reduce_bias, expand, expand_bias)
        self.backward(y, x, reduce, reduce_bias, expand, expand_bias)

    def nms(self) -> None:
        n = self.size(1, 7, 40)
        boxes = self.boxes(n).to(self.dtype)
        ops.nms(boxes, torch.rand(n).to(self.dtype), 0.5)
        labels = torch.randint(0, 3, (2, n)).sort(1).values
        torch.ops.effdet_fast.nms(torch.stack([boxes, boxes]), labels, 0.3, self.size())

    def nms_padded(self) -> None:
        batch, n = self.size(1, 2), self.size(1, 7, 40)
        problem = (
            self.boxes(batch, n).to(self.dtype),
            torch.rand(batch, n).to(self.dtype),
            torch.randint(-5, 5, (batch, n)),
        )
        options = {"max_detections": self.size(1, 5, 60), "score_threshold": self.rng.choice((None, 0.3))}
        for method in ("hard", "gaussian", "linear"):
            ops.batched_nms_padded(*problem, 0.4, method=method, **options)

    def match_anchors(self) -> None:
        batch, most, dtype = self.size(1, 2), self.size(1, 5, 40), self.floats(0).dtype
        labels = torch.randint(-1, 4, (batch, most))
        counts = self.rng.choice((None, torch.randint(0, most + 1, (batch,))))
        force = self.rng.choice(((True, False), (False, True), (False, False)))
        options = {"pos_iou": 0.5, "neg_iou": 0.4, "force_match": force[0], "allow_low_quality_matches": force[1]}
        coder = self.rng.choice((None, "effdet", "torchvision"))
        gt_boxes = self.boxes(batch, most).to(dtype) + 0.01
        ops.match_anchors(
            self.boxes(self.size(1, 33, 300)).to(dtype), gt_boxes, labels, counts, box_coder=coder, **options
        )

    def decode(self) -> None:
        images, per_cell, classes = self.size(1, 2), self.size(1, 3), self.size(1, 4)
        sizes = [(self.size(), self.size()) for _ in range(self.size(1, 2))]
        cls = [self.tensor(images, per_cell * classes, *size, grad=False) for size in sizes]
        box = [self.tensor(images, per_cell * 4, *size, grad=False) for size in sizes]
        anchors = self.boxes(per_cell * sum(h * w for h, w in sizes)).to(self.floats(0).dtype)
        clip = self.rng.choice((None, torch.full((images, 2), 16.0, dtype=anchors.dtype)))
        candidates, coder = self.size(1, 20, 5000), self.rng.choice(("effdet", "torchvision"))
        options = {"num_classes": classes, "max_candidates": candidates, "clip_sizes": clip, "box_coder": coder}
        ops.decode_detections(cls, box, anchors, **options)


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


def is_ordinary(x: Tensor) -> bool:
    return x.is_cpu and x.layout == torch.strided and not (x._is_zerotensor() or x.is_conj() or x.is_neg())


def clone_of(x: Any) -> Any:
    """The same values, dense, at an address that is as well aligned."""
    if not isinstance(x, Tensor) or x.layout != torch.strided or x.is_meta:
        return x
    values = torch.zeros(x.shape, dtype=x.dtype) if x._is_zerotensor() else x.resolve_conj().resolve_neg()
    if values.untyped_storage().nbytes() < values.numel() * values.element_size():
        return values  # there are none
    shift = 0 if x._is_zerotensor() else values.data_ptr() % GUARD // values.element_size()
    return place(values, dense_strides(x), shift)[0]


def bits(x: Tensor) -> Tensor:
    return x.detach().clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


def outcome(op: Callable, arguments: tuple) -> list[Tensor] | Exception:
    try:
        result = op(*arguments)
    except Exception as error:
        return error
    return [x for x in tree_flatten(result)[0] if isinstance(x, Tensor)]


class Wrong(AssertionError):
    pass


def check_call(op: torch._ops.OpOverload, arguments: tuple) -> bool:
    """Whether the operator took them. Raises Wrong where it did not do what it does on clones, or wrote elsewhere."""
    written = {i for i, a in enumerate(op._schema.arguments) if a.alias_info is not None and a.alias_info.is_write}
    flat, spec = tree_flatten(list(arguments))
    of_argument = [i for i, a in enumerate(arguments) for _ in tree_flatten(a)[0]]
    memories: list[tuple[int, Tensor, Tensor]] = []  # argument, all of its memory, and that before
    placed = []
    for i, x in zip(of_argument, flat, strict=True):
        inside = (
            isinstance(x, Tensor) and is_ordinary(x) and x.untyped_storage().nbytes() >= x.numel() * x.element_size()
        )
        if inside and x.data_ptr() % x.element_size() == 0:
            strides, shift = x.stride(), x.data_ptr() % GUARD // x.element_size()
            if 0 in (strides if x.numel() else ()):  # `place` writes every element once
                memory = x
            else:
                x, memory = place(x, strides, shift)
            memories.append((i, memory, memory.clone()))
        placed.append(x)
    clones = [clone_of(x) for x in flat]
    found = outcome(op, tuple(tree_unflatten(placed, spec)))
    for i, memory, before in memories:
        edge = slice(None) if i not in written or memory.dtype != torch.uint8 else slice(0, GUARD)
        if not torch.equal(bits(memory)[edge], bits(before)[edge]):
            raise Wrong(f"argument {i} or the memory around it was written")
        if i in written and memory.dtype == torch.uint8 and not torch.equal(memory[-GUARD:], before[-GUARD:]):
            raise Wrong(f"the memory behind argument {i} was written")
    if isinstance(found, Exception):
        return False
    if any(x.is_meta for x in flat if isinstance(x, Tensor)):
        if any(isinstance(x, Tensor) and not x.is_meta for x in flat) or not all(x.is_meta for x in found):
            raise Wrong("tensors of two devices were taken")
        return True
    expected = outcome(op, tuple(tree_unflatten(clones, spec)))
    if isinstance(expected, Exception):
        raise Wrong(f"was taken, but not its clones: {expected}")
    found += [placed[k] for k, i in enumerate(of_argument) if i in written and isinstance(placed[k], Tensor)]
    expected += [clones[k] for k, i in enumerate(of_argument) if i in written and isinstance(clones[k], Tensor)]
    for k, (a, b) in enumerate(zip(found, expected, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype or not torch.equal(bits(a), bits(b)):
            raise Wrong(f"result {k} is not that of clones: {describe(a)} {a.flatten()[:8]} and {b.flatten()[:8]}")
    return True


def run(cases: int, seed: int, dtypes: list[torch.dtype]) -> dict[str, list[int]]:
    """For each operator how many calls it took and how many it refused."""
    counts: dict[str, list[int]] = {}
    by_op: dict[str, list[Call]] = {}
    for case in range(cases):
        rng = random.Random(f"{seed} {case}")
        if case % 200 == 0:
            torch.manual_seed(seed + case)
            by_op.clear()
            for op, arguments in Valid(rng, dtypes).record():
                if not check_call(op, arguments):
                    raise Wrong(f"{op}: a valid call was refused")
                by_op.setdefault(str(op), []).append((op, arguments))
        torch.manual_seed(case)
        op, arguments = rng.choice(by_op[rng.choice(sorted(by_op))])
        arguments, said = mutated(rng, arguments)
        print(f"{case} {op} {said}", flush=True)
        taken = check_call(op, arguments)
        counts.setdefault(op._schema.name.partition("::")[2], [0, 0])[not taken] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("backend", choices=["cpu", "emulated"])
    parser.add_argument("cases", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--library", type=Path)
    parser.add_argument("--only-float32", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dtypes = (
        [torch.float32] if arguments.only_float32 else [torch.float32, torch.float64, torch.float16, torch.bfloat16]
    )
    context: Any = contextlib.nullcontext()
    if arguments.backend == "emulated":
        from tests.emulation.backend import emulated

        context = emulated(arguments.library)
    with context:
        counts = run(arguments.cases, arguments.seed, dtypes)
    print("taken, refused:", counts)


if __name__ == "__main__":
    main()
