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
