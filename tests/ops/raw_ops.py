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
from torch.utils._pytree import tree_flatten, tree_unflatten

from tests.ops.strange_arguments import GUARD, dense_strides, describe, mutated, place
from tests.ops.valid_calls import RawCall, valid_calls


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


def are_same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit; but the order of a loss's sum may follow from the strides, which clones do not keep."""
    return torch.equal(bits(a), bits(b)) or (a.dim() == 0 and bool(torch.isclose(a, b, rtol=1e-6, atol=0)))


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
        if a.shape != b.shape or a.dtype != b.dtype or not are_same(a, b):
            raise Wrong(f"result {k} is not that of clones: {describe(a)} {a.flatten()[:8]} and {b.flatten()[:8]}")
    return True


def run(cases: int, seed: int, dtypes: list[torch.dtype]) -> dict[str, list[int]]:
    """For each operator how many calls it took and how many it refused."""
    counts: dict[str, list[int]] = {}
    by_op: dict[str, list[RawCall]] = {}
    for case in range(cases):
        rng = random.Random(f"{seed} {case}")
        if case % 200 == 0:
            torch.manual_seed(seed + case)
            by_op.clear()
            for op, arguments in valid_calls(rng, dtypes):
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
