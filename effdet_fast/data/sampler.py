"""Which images make up which batch, on which rank."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

Key = tuple[int, int]


class TrainingBatches(Sampler[list[Key]]):
    """Shuffled batches of (epoch, index), the same number of full ones on every rank.

    The order depends on (seed, epoch) alone, and batch b of all ranks together holds the same images for whatever
    number of ranks with `batch_size * world_size` the same. The last batch is filled up from the start of the order,
    or left out with `drop_last` (unless it is the only one).
    """

    def __init__(
        self, length: int, batch_size: int, *, seed: int, rank: int, world_size: int, drop_last: bool = False
    ) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size = rank, world_size
        whole, rest = divmod(length, batch_size * world_size)
        self.batches = max(1, whole) if drop_last else whole + (rest > 0)
        self.epoch = 0
        self.start_batch = 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, start = self.epoch, self.start_batch
        self.start_batch = 0
        order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
        order = np.resize(order, (self.batches, self.world_size, self.batch_size))
        for batch in range(start, self.batches):
            yield [(epoch, int(i)) for i in order[batch, self.rank]]


class EvaluationBatches(Sampler[list[Key]]):
    """Every image once over all ranks, in the data set's order, every `world_size`-th on each rank."""

    def __init__(self, length: int, batch_size: int, *, rank: int, world_size: int) -> None:
        self.batch_size = batch_size
        self.indices = range(rank, length, world_size)
        self.epoch = 0
        self.start_batch = 0

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        start, self.start_batch = self.start_batch, 0
        for batch in range(start, len(self)):
            yield [(self.epoch, i) for i in self.indices[batch * self.batch_size : (batch + 1) * self.batch_size]]
