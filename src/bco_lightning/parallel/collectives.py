"""What processes tell each other; other collectives are those of metrics, of strategies and of sharded tensors."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from bco_lightning.errors import UserError


@dataclass(frozen=True)
class Processes:
    """Who takes part, where no trainer is at hand; one process alone if nothing is said."""

    world_size: int = 1
    global_rank: int = 0

    @classmethod
    def all(cls) -> Processes:
        """All that have met."""
        met = torch.distributed.is_initialized()
        return cls(torch.distributed.get_world_size(), torch.distributed.get_rank()) if met else cls()


def sum_over_ranks(values: Tensor, trainer: Any) -> Tensor:
    """Adds a tensor of the same shape and data type over all processes; the result is on the CPU."""
    return _reduced(values, trainer, torch.distributed.ReduceOp.SUM)


def max_over_ranks(values: Tensor, trainer: Any) -> Tensor:
    """The largest of each entry over all processes; the result is on the CPU. NaN is not allowed."""
    return _reduced(values, trainer, torch.distributed.ReduceOp.MAX)


def _reduced(values: Tensor, trainer: Any, how: Any) -> Tensor:
    if trainer.world_size == 1:
        return values.cpu()
    reduced = values.to(trainer.strategy.root_device, copy=True)
    torch.distributed.all_reduce(reduced, op=how)
    return reduced.cpu()


def gather_over_ranks(value: Any, trainer: Any) -> list[Any]:
    """Plain values of all processes, in order of rank, on every rank; for rare events, since it is slow."""
    if trainer.world_size == 1:
        return [value]
    gathered: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def by_all(act: Callable[[], Any], trainer: Any) -> list[Any]:
    """What ``act`` gives in each process; where it fails in one of them, it fails in all, with that error."""
    made, own, told = None, None, None
    try:
        made = act()
    except Exception as error:
        own = error
        known = isinstance(error, (UserError, OSError))  # other kinds may not survive the way
        told = error if known else RuntimeError(f"{type(error).__name__}: {error}")
    for fault in (own, *gather_over_ranks(told, trainer)):  # this one's own first
        if fault is not None:
            raise fault
    return gather_over_ranks(made, trainer)


def made_once_per_node(make: Callable[[], Any], trainer: Any) -> list[Any]:
    """What the first process of each node makes, in every process.

    The other processes of a node wait however long that takes, idle; they end with an error if the first one ends. The
    nodes then wait for each other as long as in any collective. What ``make`` raises, only its own process raises.
    """
    nodes = gather_over_ranks(trainer.node_rank, trainer)
    # gloo, whatever the processes speak otherwise: it can wait for long, and notices when one of them is gone. The
    # group stays until the process ends, since another one with its name would find its addresses; and those outside
    # of it must not be asked to join in making it: over NCCL that would split their communicator, and hang.
    ranks = [rank for rank, other in enumerate(nodes) if other == trainer.node_rank]
    node = torch.distributed.new_group(ranks, timedelta(days=365), "gloo", use_local_synchronization=True)
    made = [make()] if trainer.local_rank == 0 else []
    waiting = torch.distributed.all_reduce(torch.zeros(1), group=node, async_op=True)
    while not waiting.is_completed():  # a signal is heard between two looks
        time.sleep(0.02)
    waiting.wait()
    return [value for values in gather_over_ranks(made, trainer) for value in values]
