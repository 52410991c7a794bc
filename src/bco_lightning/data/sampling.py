"""Row order as a function of the seed and the optimizer step, the same for any number of ranks and workers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from torch.utils.data import Sampler


class RowOrder:
    """Which rows each optimizer step trains on.

    Every pool is passed through in a new seeded permutation again and again; a step that reaches the end of one pass
    goes on with the next, so no step is short and no row is left out or repeated within a pass.

    Args:
        pools: Row positions to draw from: one pool of all rows, or one for each class.
        rows_per_step: How many rows a step takes from each pool.
        seed: Seed of the permutations.
        groups: A number for each row; in every pass rows with the same number follow each other.

    Example:
        >>> order = RowOrder([[0, 1, 2]], [2], seed=0)
        >>> sorted(order.rows_of_step(0) + order.rows_of_step(1)[:1])
        [0, 1, 2]
    """

    def __init__(
        self,
        pools: Sequence[Sequence[int]],
        rows_per_step: Sequence[int],
        seed: int,
        groups: np.ndarray[Any, Any] | None = None,
    ) -> None:
        self._groups = groups
        self._pools = [np.asarray(pool, dtype=np.int64) for pool in pools]
        self._rows_per_step = list(rows_per_step)
        self._seed = seed
        # A step touches one pass of each pool, or two at a border.
        self._permutation = lru_cache(maxsize=2 * len(self._pools))(self._make_permutation)

    def rows_of_step(self, step: int) -> list[int]:
        """Row positions of optimizer step ``step`` (from 0), the pools evenly interleaved."""
        drawn = []
        for number, (pool, count) in enumerate(zip(self._pools, self._rows_per_step, strict=True)):
            passes, places = np.divmod(np.arange(step * count, (step + 1) * count), len(pool))
            rows = [int(pool[self._permutation(number, int(p))[i]]) for p, i in zip(passes, places, strict=True)]
            drawn += [((position + 0.5) / count, number, row) for position, row in enumerate(rows)]
        return [row for _, _, row in sorted(drawn)]

    def _make_permutation(self, pool: int, pass_number: int) -> np.ndarray:
        permutation = np.random.default_rng([self._seed, pool, pass_number]).permutation(len(self._pools[pool]))
        if self._groups is None:
            return permutation
        groups = self._groups[self._pools[pool]][permutation]
        _, first, member = np.unique(groups, return_index=True, return_inverse=True)
        # Each row moves up to the place of the first row of its group.
        return permutation[np.argsort(first[member], kind="stable")]


class StepBatchSampler(Sampler[list[int]]):
    """Micro-batches of one rank, from the current optimizer step to the end of the epoch.

    The position is asked for, never stored: after a resume the loader begins where the restored step says.

    Args:
        order: The rows of each step.
        batch_size: Rows of a micro-batch.
        accumulation: Micro-batches of a step on each rank.
        rank: This process.
        world_size: Number of processes.
        steps_per_epoch: Optimizer steps of an epoch.
        current_step: Gives the number of optimizer steps done so far.
        lengths: Tokens of each row; a step's rows are then cut into micro-batches of like lengths. The gradient does
            not depend on how a step is cut, and padded micro-batches have less padding so.
    """

    def __init__(
        self,
        order: RowOrder,
        *,
        batch_size: int,
        accumulation: int,
        rank: int,
        world_size: int,
        steps_per_epoch: int,
        current_step: Callable[[], int],
        lengths: np.ndarray[Any, Any] | None = None,
    ) -> None:
        self._lengths = lengths
        self._order, self._batch_size, self._accumulation = order, batch_size, accumulation
        self._rank, self._world_size = rank, world_size
        self._steps_per_epoch, self._current_step = steps_per_epoch, current_step

    def __len__(self) -> int:
        return self._steps_per_epoch * self._accumulation

    def __iter__(self) -> Iterator[list[int]]:
        first = self._current_step()
        end = (first // self._steps_per_epoch + 1) * self._steps_per_epoch
        for step in range(first, end):
            rows = self._order.rows_of_step(step)
            if self._lengths is not None:
                rows = sorted(rows, key=self._lengths.__getitem__)
            for micro_batch in range(self._accumulation):
                start = (micro_batch * self._world_size + self._rank) * self._batch_size
                yield rows[start : start + self._batch_size]


class EvenBatchSampler(Sampler[list[int]]):
    """Micro-batches of one rank, every row of a data set on one rank and once, in order.

    Where models are sharded, all ranks have to run as many passes; a rank without rows has none.

    Args:
        num_rows: Rows of the data set.
        batch_size: Rows of a micro-batch at most; one more where nothing else comes out even.
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(self, num_rows: int, batch_size: int, rank: int, world_size: int) -> None:
        rows = range(rank, num_rows, world_size)
        passes = min(math.ceil(math.ceil(num_rows / world_size) / batch_size), max(1, num_rows // world_size))
        self._parts = [part.tolist() for part in np.array_split(rows, passes)] if rows else []

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._parts)
