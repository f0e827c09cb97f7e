"""`patch_torchvision()` puts our operators behind torchvision's names, for code that calls those."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effdet_fast.acceleration.stand_in import stand_in
from effdet_fast.ops import _library
from effdet_fast.ops.focal_loss import sigmoid_focal_loss
from effdet_fast.ops.nms import batched_nms, nms

_Function = Callable[..., Tensor]
_patches: set[Patch] = set()
_pairs: list[tuple[_Function, _Function]] = []


class Patch:
    """A patch of torchvision, from `patch_torchvision`; it lasts until `restore()` or the end of a `with` block."""

    def restore(self) -> None:
        """End the patch; the last patch to end gives torchvision its functions back. A second call does nothing."""
        _patches.discard(self)
        if not _patches:
            _exchange([(ours, original) for original, ours in _pairs])

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()


def patch_torchvision() -> Patch:
    """Put our `nms`, `batched_nms` and `sigmoid_focal_loss` behind torchvision's names.

    Every module of torchvision that has one of these functions gets ours under the same name: `torchvision.ops`,
    `torchvision.ops.boxes`, `torchvision.ops.focal_loss` and the detection models. Patch first: names that other packages have
    already imported (`from torchvision.ops import nms`) stay torchvision's. Signatures, dtypes and results are torchvision's:

    - `nms` is the same for every input, with equal scores in the order of their index.
    - `batched_nms` compares classes by id, and equals torchvision's loop over the classes for every number of boxes. For few
      boxes, torchvision itself moves the classes apart by an offset, which rounds large coordinates and is wrong for negative
      ones.
    - `sigmoid_focal_loss` is the same up to round-off for targets in [0, 1]. Where torchvision's gradient is not a number
      (`gamma` below 1 and a certain prediction), ours is its limit 0.

    What ours do not take goes to torchvision's function, with its errors: quantized boxes, targets that need a gradient, and
    devices without our kernels. `torch.jit.trace`, `torch.jit.script` and `torch.fx` get torchvision's too.

    Returns:
        A `Patch`: call its `restore()`, or use it in a `with` statement. Patches may be nested and end in any order; the last one
        to end restores torchvision exactly.

    Raises:
        ImportError: torchvision cannot be imported.

    Example:
        ```python
        with effdet_fast.patch_torchvision():
            kept = torchvision.ops.nms(boxes, scores, 0.5)  # runs effdet_fast.ops.nms
        ```
    """
    try:
        from torchvision.ops import boxes, focal_loss
    except ImportError as error:
        raise ImportError(f"patch_torchvision: torchvision must be installed, got {error}") from error
    if not _patches:
        _pairs[:] = [
            (original, _in_place_of(original, ours))
            for original, ours in (
                (boxes.nms, nms),
                (boxes.batched_nms, batched_nms),
                (focal_loss.sigmoid_focal_loss, _sigmoid_focal_loss),
            )
        ]
        _exchange(_pairs)
    patch = Patch()
    _patches.add(patch)
    return patch


def _sigmoid_focal_loss(
    inputs: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2, reduction: str = "none"
) -> Tensor:
    if not targets.is_floating_point():
        raise TypeError("integers are no labels to torchvision")
    loss = sigmoid_focal_loss(inputs, targets, alpha, gamma, reduction)
    # Ours sums halves in float32; torchvision does under autocast alone.
    return loss if torch.is_autocast_enabled(inputs.device.type) else loss.to(inputs.dtype)


def _in_place_of(original: _Function, ours: _Function) -> _Function:
    def function(*args: Any, **kwargs: Any) -> Tensor:
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        # Whoever took this function along while patched has torchvision's afterwards.
        if _patches and all(map(_library.is_native, tensors)):
            try:
                return ours(*args, **kwargs)
            except (TypeError, ValueError):
                pass
        return original(*args, **kwargs)

    return stand_in(original, function)


def _exchange(pairs: list[tuple[_Function, _Function]]) -> None:
    """Replace the first of each pair by the second wherever torchvision has it; what others put there stays."""
    replacements = {id(old): new for old, new in pairs}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "torchvision":
            for attribute, value in list(vars(module).items()):
                if id(value) in replacements:
                    setattr(module, attribute, replacements[id(value)])
