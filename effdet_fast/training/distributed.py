"""One process or several: who am I, who writes, and what all of them agree on."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import gc
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from effdet_fast.device import choose_device

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of a run, as torchrun started them (or the one process of a run without torchrun).

    Args:
        rank: Index of this process.
        world_size: Number of processes.
        local_rank: Index among the processes of this machine; also the index of its GPU.
        host_group: Gloo group for agreements between hosts, so that they never wait for a GPU.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    host_group: Any = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def on_main(self, action: Callable[[], T]) -> T:
        """Run `action` on the main process and return its result, or raise its error, on every process."""
        if self.world_size == 1:
            return action()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = action()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self.host_group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def gather(self, value: T) -> list[T]:
        """The `value` of every process, in order of rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Give every process the main process's buffers: plain BatchNorm keeps its own statistics per process."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)


class Agreement:
    """A number all processes see the maximum of, one step late, without waiting for a GPU.

    `exchange` posts this process's number and returns the maximum over all processes of the number posted one call
    before, so every process learns the same thing at the same step.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._pending: tuple[Any, Tensor] | None = None

    def exchange(self, value: int) -> int:
        if self._processes.world_size == 1:
            return value
        agreed = self.drain()
        number = torch.tensor([value], dtype=torch.int64)
        work = dist.all_reduce(number, dist.ReduceOp.MAX, group=self._processes.host_group, async_op=True)
        self._pending = (work, number)
        return agreed

    def drain(self) -> int:
        """The number still under way, or 0; call at the end of an epoch."""
        if self._pending is None:
            return 0
        work, number = self._pending
        self._pending = None
        work.wait()
        return int(number.item())


def is_launched() -> bool:
    """Whether torchrun (or a launcher that sets the same variables) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def join_processes(device_name: str | None) -> tuple[Processes, torch.device]:
    """The processes torchrun started and this one's device; without torchrun, one process.

    A process joins once, and leaves when it exits: PyTorch cannot leave and join again over the same rendezvous.
    """
    if not is_launched() or int(os.environ["WORLD_SIZE"]) == 1:
        return Processes(), choose_device(device_name)
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = choose_device(device_name, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(_leave)
    return Processes(dist.get_rank(), dist.get_world_size(), local_rank, _host_group(dist.group.WORLD)), device


@functools.lru_cache(maxsize=1)
def _host_group(_world: Any) -> Any:
    """One Gloo group beside the given default group."""
    return dist.new_group(backend="gloo")


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    _host_group.cache_clear()
    gc.collect()  # ends the groups' threads, which need the interpreter while they end


def wrap_model(model: nn.Module, processes: Processes, device: torch.device) -> nn.Module:
    """The model whose forward pass makes backward average the gradients over the processes.

    The loss of each process is normalized by its own positives, as effdet does, and the gradients are then averaged.
    """
    if processes.world_size == 1:
        return model
    device_ids = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=device_ids)
