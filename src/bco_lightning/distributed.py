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
    return [float(value) for value in max_tensor_over_ranks(torch.tensor(values, dtype=torch.float64), trainer)]


def max_tensor_over_ranks(values: Tensor, trainer: Any) -> Tensor:
    """The largest of each entry over all processes; the result is on the CPU. NaN is not allowed."""
    if trainer.world_size == 1:
        return values.cpu()
    largest = values.to(trainer.strategy.root_device, copy=True)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return largest.cpu()


def gather_rows_over_ranks(rows: Tensor, trainer: Any) -> Tensor:
    """Rows of numbers of all processes, one below the other in order of rank, on every rank and on its CPU.

    Args:
        rows: Shape ``(rows, columns)``; each process may have another number of rows.
        trainer: The Lightning trainer.

    Returns:
        Shape ``(rows of all processes, columns)``.
    """
    if trainer.world_size == 1:
        return rows.cpu()
    (most,) = max_over_ranks([float(len(rows))], trainer)
    table = rows.new_zeros(trainer.world_size, int(most), 1 + rows.shape[1])
    table[trainer.global_rank, : len(rows), 0] = 1  # which rows there are
    table[trainer.global_rank, : len(rows), 1:] = rows
    gathered = sum_tensor_over_ranks(table, trainer).flatten(0, 1)
    return gathered[gathered[:, 0] > 0, 1:]


def gather_over_ranks(value: Any, trainer: Any) -> list[Any]:
    """Plain values of all processes, in order of rank, on every rank; for rare events, since it is slow."""
    if trainer.world_size == 1:
        return [value]
    gathered: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(gathered, value)
    return gathered
