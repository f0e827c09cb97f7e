"""The gate before the clock: an implementation that computes something else is reported, never timed."""

import torch
from torch import Tensor

from benchmarks.workload import Implementation

# Ours: every element, error <= tolerance * (|expected| + root mean square of expected).
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
# Peers may round as they like; they only have to compute the same function: norm of the error / norm of the expected.
PEER_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}


class WrongResultError(Exception):
    pass


def evaluate(implementation: Implementation, upstream: tuple[Tensor, ...] | None = None) -> list[Tensor]:
    """Outputs, followed by the gradients of the leaves for the given upstream gradients of the floating outputs."""
    outputs = as_tuple(implementation.forward())
    if not implementation.leaves:
        return [output.detach() for output in outputs]
    gradients = torch.autograd.grad(outputs, implementation.leaves, upstream_gradients(outputs, upstream))
    return [*(output.detach() for output in outputs), *gradients]


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def upstream_gradients(outputs: tuple[Tensor, ...], upstream: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    """The given gradients in each output's dtype and strides; ones for scalars, as `loss.backward()` has it."""
    if upstream is None:
        return tuple(torch.ones_like(output) for output in outputs)
    return tuple(
        torch.empty_like(o, requires_grad=False).copy_(g.reshape(o.shape))
        for o, g in zip(outputs, upstream, strict=True)
    )


def check(
    implementation: Implementation,
    expected: list[Tensor],
    upstream: tuple[Tensor, ...] | None,
    dtype: torch.dtype,
    is_peer: bool,
    compared: int | None = None,
    gradient_tolerance: float | None = None,
) -> float:
    """Relative error of the worst of the results, or of the first `compared`.

    With `gradient_tolerance` all results but the first are compared as one vector: norm of the error / norm of the expected.

    Raises WrongResultError where it is too large; lets other errors through.
    """
    results = evaluate(implementation, upstream)
    if len(results) != len(expected):
        raise WrongResultError(f"{len(results)} results instead of {len(expected)}")
    results, expected = results[:compared], expected[:compared]
    worst = 0.0
    if gradient_tolerance is not None and len(results) > 1:
        gradients = _as_vector(results[1:]), _as_vector(expected[1:])
        worst = _norm_error("the vector of all gradients", *gradients, gradient_tolerance)
        results, expected = results[:1], expected[:1]
    for i, (result, wanted) in enumerate(zip(results, expected, strict=True)):
        if result.shape != wanted.shape and result.numel() != wanted.numel():
            raise WrongResultError(f"result {i} has shape {list(result.shape)} instead of {list(wanted.shape)}")
        worst = max(worst, _compare(i, result.reshape(wanted.shape), wanted, dtype, is_peer))
    return worst


def _compare(i: int, result: Tensor, wanted: Tensor, dtype: torch.dtype, is_peer: bool) -> float:
    if not wanted.is_floating_point():
        different = int((result != wanted).sum())
        if different:
            raise WrongResultError(f"result {i} differs in {different} of {wanted.numel()} values")
        return 0.0
    if is_peer:
        return _norm_error(f"result {i}", result, wanted, PEER_TOLERANCE[dtype])
    norm_error = _norm_error(f"result {i}", result, wanted, float("inf"))
    error = (result.double() - wanted.double()).abs_()
    scale = _root_mean_square(wanted)
    excess = error - TOLERANCE[dtype] * (wanted.double().abs() + scale)
    if wanted.numel() and not float(excess.max()) <= 0:  # NaN does not pass
        raise WrongResultError(f"result {i} is off by up to {float(error.max()):.1e} (values of size {scale:.1e})")
    return norm_error


def _norm_error(name: str, result: Tensor, wanted: Tensor, tolerance: float) -> float:
    error = _root_mean_square(result.double() - wanted.double()) / max(_root_mean_square(wanted), 1e-300)
    if not error <= tolerance:
        raise WrongResultError(f"{name} is off by {error:.1e} of its norm")
    return error


def _root_mean_square(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt()) if x.numel() else 0.0


def _as_vector(results: list[Tensor]) -> Tensor:
    return torch.cat([result.double().flatten() for result in results])
