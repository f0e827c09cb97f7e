"""How far a result may be from the float64 oracle."""

import torch
from torch import Tensor

RTOL = {torch.float64: 1e-12, torch.float32: 3e-6}


def assert_accurate(
    ours: Tensor, exact: Tensor, peer: Tensor | None = None, scale: Tensor | float | None = None
) -> None:
    """Float32 and float64: within a few units in the last place of `exact`, or of `scale` where terms cancel.
    Half precision: at most twice the error of `peer`, the same formula run by PyTorch in that precision, plus one rounding."""
    assert ours.shape == exact.shape, (ours.shape, exact.shape)
    ours64 = ours.detach().double()
    if ours.dtype in RTOL:
        bound = RTOL[ours.dtype] * (
            exact.abs() if scale is None else torch.maximum(exact.abs(), torch.as_tensor(scale).double())
        )
        bound = bound + torch.finfo(ours.dtype).tiny
    else:
        assert peer is not None, "half precision is judged against a peer"
        peer_error = (peer.detach().double() - exact).abs().nan_to_num(0)  # where the peer gives NaN it excuses nothing
        worst = peer_error.max() if exact.numel() else torch.tensor(0.0)
        bound = 2 * worst + torch.finfo(ours.dtype).eps / 2 * exact.abs()
    error = (ours64 - exact).abs()
    both_special = (ours64 == exact) | (ours64.isnan() & exact.isnan())
    assert bool(((error <= bound) | both_special).all()), f"error {error[~both_special].max():.3e} exceeds the bound"


def guarded(x: Tensor, offset: int = 3) -> Tensor:
    """The same tensor as a view into a larger buffer full of NaN (or of the largest integer), starting misaligned."""
    fill = float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max
    buffer = torch.full((x.numel() + 2 * offset + 64,), fill, dtype=x.dtype, device=x.device)
    return buffer.as_strided(x.shape, x.stride(), offset).copy_(x)


def assert_layer_accurate(results, expected, peer, x: Tensor, grad: Tensor, scale: float) -> None:
    """A layer's result of the size `scale`, and the gradients of x and of its parameters. Terms of the gradients cancel: their
    scale is that of the terms."""
    peer = peer or (None, None)
    values = x.numel() / max(x.shape[1], 1)
    assert_accurate(results[0], expected[0], peer[0], scale=scale)
    assert_accurate(results[1], expected[1], peer[1], scale=4 * max(float(grad.abs().max()), 1.0))
    for mine, wanted in zip(results[2:], expected[2:], strict=True):
        assert_accurate(mine, wanted, scale=4 * values**0.5)


def assert_convolved(results, expected, peer) -> None:
    """The errors against the largest value of each; in half precision at most twice the peer's, and one rounding is allowed."""
    for i, (mine, exact, other) in enumerate(zip(results, expected, peer, strict=True)):
        assert mine.shape == exact.shape
        scale = exact.abs().max().item() + 1e-6
        tolerance = {torch.float64: 1e-13, torch.float32: 3e-6}.get(mine.dtype)
        if tolerance is None:
            tolerance = max(2 * (other.double() - exact).abs().max().item() / scale, torch.finfo(mine.dtype).eps)
        error = (mine.double() - exact).abs().max().item() / scale
        assert error <= tolerance, f"result {i}: {error:.3g} > {tolerance:.3g}"
