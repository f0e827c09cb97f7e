"""What tests of many parts do alike: maps of either layout, gradients, equal bits in every run, capture into a CUDA graph."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from effdet_fast.ops._layout import memory_format
from tests.emulation.backend import emulated

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
ACTIVATIONS = {None: lambda x: x, "silu": F.silu, "relu": F.relu, "relu6": F.relu6}


def random_map(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    channels_last: bool = False,
    mean: float = 0.0,
    deviation: float = 1.0,
) -> Tensor:
    """[N, C, H, W], drawn in float64 on the CPU: every dtype, layout and device gets the same numbers."""
    x = torch.randn(shape, dtype=torch.float64) * deviation + mean
    return x.to(dtype).to(memory_format=memory_format(channels_last)).to(device)


def with_gradients(function: Callable, inputs: Any, *others: Any, grad: Any = None, **options: Any) -> list[Tensor]:
    """The results of `function(*inputs, *others, **options)`, then the gradients of all tensors in the tree `inputs`. What comes
    from above is `grad`, of each result its own, or ones."""
    flat, spec = tree_flatten(inputs)
    flat = [x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in flat]
    results = tree_leaves(function(*tree_unflatten(flat, spec), *others, **options))
    grads = [torch.ones_like(y) for y in results] if grad is None else tree_leaves(grad)
    grads = [g.to(y.dtype) for g, y in zip(grads, results, strict=True)]
    leaves = [x for x in flat if isinstance(x, Tensor)]
    return [*(y.detach() for y in results), *torch.autograd.grad(results, leaves, grads)]


def all_equal(a: Any, b: Any) -> bool:
    """Whether two sequences or dictionaries, or such of such, hold equal tensors in the same places."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(all_equal(value, b[key]) for key, value in a.items())
    a, b = list(a), list(b)
    return len(a) == len(b) and all(all_equal(x, y) for x, y in zip(a, b, strict=True))


def distance(values: Iterable[Tensor], exact: Iterable[Tensor]) -> float:
    """Of all tensors together, relative; of dictionaries name by name."""
    if isinstance(values, dict) and isinstance(exact, dict):
        assert values.keys() == exact.keys()
        values, exact = [values[key] for key in exact], exact.values()
    mine, other = (torch.cat([x.double().flatten() for x in each]) for each in (values, exact))
    return float((mine - other).norm() / other.norm())


def assert_same_in_every_run(run: Callable[[], Any], repeats: int = 20) -> Any:
    """On one thread, two and three in turn, `run()` gives the same bits. Returns what it gave."""
    before, first = torch.get_num_threads(), None
    try:
        for i in range(repeats):
            torch.set_num_threads(1 + i % 3)
            result = run()
            first = result if first is None else first
            assert all_equal(first, result), f"run {i} differs"
    finally:
        torch.set_num_threads(before)
    return first


def assert_same_in_any_order(run: Callable[[], Any], seeds: Iterable[int] = (1, 2, 3)) -> None:
    """In whatever order the emulation runs the threads of a block, `run()` gives the same bits."""
    results = []
    for seed in seeds:
        with emulated(thread_order_seed=seed):
            results.append(run())
    assert len(results) > 1 and all(all_equal(results[0], other) for other in results[1:])


def captured(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """`run()` in a CUDA graph, and its result, which a replay writes anew. It must not wait for the GPU."""
    run()  # what a first call sets up may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return graph, result
