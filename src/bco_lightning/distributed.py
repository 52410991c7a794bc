"""What processes tell each other; other collectives are those of metrics, of strategies and of sharded tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sum_over_ranks(values: list[float], trainer: Any) -> list[float]:
    """Adds numbers over all processes, in float64 and in one collective.

    Args:
        values: The same number of values on each rank.
        trainer: The Lightning trainer.

    Returns:
        The sums, equal on every rank.
    """
    return [float(value) for value in sum_tensor_over_ranks(torch.tensor(values, dtype=torch.float64), trainer)]


def sum_tensor_over_ranks(values: Tensor, trainer: Any) -> Tensor:
    """Adds a tensor of the same shape and data type over all processes; the result is on the CPU."""
    if trainer.world_size == 1:
        return values.cpu()
    summed = values.to(trainer.strategy.root_device, copy=True)
    torch.distributed.all_reduce(summed)
    return summed.cpu()


def max_over_ranks(values: list[float], trainer: Any) -> list[float]:
    """The largest of each number over all processes, in one collective; NaN is not allowed."""
    if trainer.world_size == 1:
        return values
    largest = torch.tensor(values, dtype=torch.float64, device=trainer.strategy.root_device)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return [float(value) for value in largest]


def gather_over_ranks(value: Any, trainer: Any) -> list[Any]:
    """Plain values of all processes, in order of rank, on every rank; for rare events, since it is slow."""
    if trainer.world_size == 1:
        return [value]
    gathered: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(gathered, value)
    return gathered
