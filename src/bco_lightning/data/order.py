"""Row order as a function of the seed and the optimizer step, the same for any number of ranks and workers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from torch.utils.data import Sampler

Array = np.ndarray[Any, Any]


class Pool:
    """Rows to draw from in passes, each a new seeded permutation; sources may be drawn from more often than others.

    Of a source with weight 2, a pass takes every row twice; of one with weight 0.5, half of the rows, and the next pass
    the other half: after any number of passes the rows of a source were taken as often as each other, or once more.
    With ``groups``, rows of one number follow each other in every pass. With ``regions``, the parts of files where rows
    lie, a pass mixes the rows of some regions, about ``window`` rows, then those of others: few are read at a time.
    """

    def __init__(
        self, rows: Sequence[int] | Array, seed: Sequence[int], sources: Array | None = None,
        weights: Sequence[float] | None = None, *, groups: Array | None = None, regions: Array | None = None,
        window: int = 1,
    ) -> None:  # fmt: skip
        self._seed, self._groups, self._regions, self._window = list(seed), groups, regions, window
        self._rows = np.asarray(rows, dtype=np.int64)
        self._parts: list[tuple[Array, int]] = []
        if sources is not None and weights is not None and any(weight != 1 for weight in weights):
            members = [self._rows[sources[self._rows] == number] for number in range(len(weights))]
            taken = [max(1, round(weight * len(rows))) if len(rows) else 0 for rows, weight in zip(members, weights)]  # noqa: B905
            self._parts = list(zip(members, taken, strict=True))
        # A step touches one pass, or two at a border.
        self.rows_of_pass = lru_cache(maxsize=2)(self._make_pass)

    def __len__(self) -> int:
        return sum(taken for _, taken in self._parts) if self._parts else len(self._rows)

    def _make_pass(self, number: int) -> Array:
        taken = [self._taken(part, number) for part in range(len(self._parts))]
        rows: Array = np.concatenate(taken or [self._rows])
        random = np.random.default_rng([*self._seed, number])
        rows = rows[random.permutation(len(rows))]
        if self._groups is not None:
            # Each row moves up to the place of the first row of its group.
            _, first, member = np.unique(self._groups[rows], return_index=True, return_inverse=True)
            return rows[np.argsort(first[member], kind="stable")]
        if self._regions is not None:
            _, region, sizes = np.unique(self._regions[rows], return_inverse=True, return_counts=True)
            order, window = random.permutation(len(sizes)), np.empty(len(sizes), np.int64)
            window[order] = (np.cumsum(sizes[order]) - sizes[order]) // self._window
            return rows[np.argsort(window[region], kind="stable")]
        return rows

    def _taken(self, part: int, number: int) -> Array:
        """What a pass takes of one source: the next rows of an endless row of permutations."""
        rows, taken = self._parts[part]
        if not taken:
            return rows
        start, stop = number * taken, (number + 1) * taken
        cycles = range(start // len(rows), (stop - 1) // len(rows) + 1)
        endless: Array = np.concatenate(
            [np.random.default_rng([*self._seed, part, cycle]).permutation(len(rows)) for cycle in cycles]
        )
        offset = cycles.start * len(rows)
        return np.take(rows, endless[start - offset : stop - offset])


def pools_of(thumbs_up: Array, seed: int, *, by_class: bool, **options: Any) -> list[Pool]:
    """One pool of all rows, or one of thumbs-up and one of thumbs-down; ``options`` are those of :class:`Pool`."""
    chosen = [thumbs_up, ~thumbs_up] if by_class else [np.ones(len(thumbs_up), bool)]
    return [Pool(np.flatnonzero(rows), [seed, number], **options) for number, rows in enumerate(chosen)]


class RowOrder:
    """Which rows each optimizer step trains on.

    Every pool is passed through again and again; a step that reaches the end of one pass goes on with the next, so no
    step is short and no row is left out or repeated within a pass. With ``pairs``, row numbers ``(P, 2)``, pools hold
    places in it, and the two rows of each follow each other.
    """

    def __init__(self, pools: Sequence[Pool], rows_per_step: Sequence[int], pairs: Array | None = None) -> None:
        self._pools, self._rows_per_step, self._pairs = list(pools), list(rows_per_step), pairs

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that take what one pass takes of every pool, and at least so much."""
        return max(math.ceil(len(pool) / count) for pool, count in zip(self._pools, self._rows_per_step, strict=True))

    def rows_of_step(self, step: int) -> list[int]:
        """Row positions of optimizer step ``step`` (from 0), the pools evenly interleaved."""
        drawn = []
        for number, (pool, count) in enumerate(zip(self._pools, self._rows_per_step, strict=True)):
            passes, places = np.divmod(np.arange(step * count, (step + 1) * count), len(pool))
            rows = [int(pool.rows_of_pass(int(p))[place]) for p, place in zip(passes, places, strict=True)]
            drawn += [((position + 0.5) / count, number, row) for position, row in enumerate(rows)]
        rows = [row for _, _, row in sorted(drawn)]
        return rows if self._pairs is None else self._pairs[rows].ravel().tolist()


class StepBatchSampler(Sampler[list[int]]):
    """Micro-batches of one rank, from the current optimizer step to the end of the epoch.

    The position is asked for, never stored: after a resume the loader begins where the restored step says.
    With ``lengths`` in tokens, a step's rows are cut into micro-batches of like lengths: padded ones have less
    padding so, and the gradient does not depend on the cut; ``dealt`` in turn, each is of all lengths, for :func:`cut`.
    With ``with_next``, behind the rows of a micro-batch come as many others: for each the next one of the step, however
    it is cut.
    """

    def __init__(
        self, order: RowOrder, *, batch_size: int, accumulation: int, rank: int, world_size: int,
        current_step: Callable[[], int], lengths: Array | None = None, dealt: bool = False, with_next: bool = False,
    ) -> None:  # fmt: skip
        self._lengths, self._dealt, self._with_next = lengths, dealt and lengths is not None, with_next
        self._order, self._batch_size, self._accumulation = order, batch_size, accumulation
        self._rank, self._world_size = rank, world_size
        self._steps_per_epoch, self._current_step = order.steps_per_epoch, current_step

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
                place = micro_batch * self._world_size + self._rank
                mine = range(place * self._batch_size, len(rows))[: self._batch_size]
                if self._dealt:
                    mine = range(place, len(rows), self._accumulation * self._world_size)
                following = [rows[(place + 1) % len(rows)] for place in mine] if self._with_next else []
                yield [*(rows[place] for place in mine), *following]


def cut(lengths: Any, most: int, *, padded: bool = False, shared: Any = 0, ends: Any = None) -> list[slice]:
    """Cuts rows, in order, into micro-batches of at most ``most`` tokens, as many rows as fit; a longer row is alone.

    Where ``padded``, a row takes as much as the longest beside it. ``shared`` tokens of a row are computed once for it
    and the row before it. A micro-batch ends at one of ``ends``, ascending numbers of rows; after any row without.
    """
    lengths, start, found = np.asarray(lengths, np.int64), 0, []
    shared, ends = np.broadcast_to(shared, lengths.shape), np.arange(1, len(lengths) + 1) if ends is None else ends
    while start < len(lengths):
        near = slice(start, start + most)  # a row has a token at least
        totals = np.cumsum(lengths[near] - shared[near]) + shared[start]
        if padded:
            totals = np.maximum.accumulate(lengths[near]) * np.arange(1, len(totals) + 1)
        first, after = np.searchsorted(ends, [start, start + np.searchsorted(totals, most, "right")], "right")
        found.append(slice(start, int(ends[max(first, after - 1)])))
        start = found[-1].stop
    return found


class EvenBatchSampler(list[list[int]]):
    """Micro-batches of one rank, every row of a data set on one rank and once, in order.

    Where models are sharded, all ranks have to run as many passes: a micro-batch has one row more than ``batch_size``
    where nothing else comes out even. A rank without rows has none. With ``pairs``, row numbers ``(P, 2)``, it is pairs
    instead of rows that are counted and dealt out.
    """

    def __init__(self, num_rows: int, batch_size: int, rank: int, world_size: int, pairs: Array | None = None) -> None:
        rows = range(rank, num_rows, world_size)
        passes = min(math.ceil(math.ceil(num_rows / world_size) / batch_size), max(1, num_rows // world_size))
        parts = np.array_split(rows, passes) if rows else []
        super().__init__((part if pairs is None else pairs[part].ravel()).tolist() for part in parts)
