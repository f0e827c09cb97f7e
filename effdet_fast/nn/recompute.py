"""A sequence of blocks that can be recomputed in the backward pass, to save memory (gradient checkpointing)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class BlockSequence(nn.Sequential):
    """An ``nn.Sequential`` that can keep only each block's input, and recompute the block in the backward pass.

    Gradients, running statistics and random numbers are those of the plain sequence: the recomputation draws the same random
    numbers and leaves the running statistics of BatchNorms alone. State-dict keys are those of ``nn.Sequential``.

    Args:
        *blocks: in order of computation.
        recompute: whether to recompute; the attribute of this name can be changed at any time.
    """

    def __init__(self, *blocks: nn.Module, recompute: bool = False) -> None:
        super().__init__(*blocks)
        self.recompute = recompute

    def forward(self, input: Any) -> Any:
        """Run the blocks one after the other; without gradients, nothing is recomputed."""
        if not (self.recompute and torch.is_grad_enabled()):
            return super().forward(input)
        for block in self:
            if (
                torch.compiler.is_compiling()
            ):  # a compiled block changes its buffers only once, whatever is computed again
                input = checkpoint(block, input, use_reentrant=False)
            else:
                contexts = functools.partial(_contexts, block)
                input = checkpoint(block, input, use_reentrant=False, context_fn=contexts)
        return input


def _contexts(block: nn.Module) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    return contextlib.nullcontext(), _keeping_statistics(block)


@contextlib.contextmanager
def _keeping_statistics(block: nn.Module) -> Iterator[None]:
    """Make BatchNorms in training mode normalize by their batch's statistics without moving the running ones."""
    norms = [
        module
        for module in block.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training and module.track_running_stats
    ]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
