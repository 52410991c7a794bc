"""Row order of a stream as a function of the seed and the optimizer step, by blocks instead of rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from bco_lightning.data.streaming.source_rows import Array, SourceRows

# What a random generator is for; each has a sequence of its own.
_CYCLE, _EPOCH, _WINDOW = 1, 2, 3


@dataclass(frozen=True)
class _Epoch:
    """The rows of one pool in an epoch, as segments of neighbouring ranks.

    Args:
        source: Number of the source of each segment.
        first: Rank of its first row.
        stop: Rows of the epoch up to its end.
    """

    source: Array
    first: Array
    stop: Array


class StreamOrder:
    """Which rows each optimizer step trains on, as :class:`RowOrder` says it for rows in one file.

    The rows of each source come in cycles, in each of which its cells (blocks, mostly) have a new order; an epoch takes
    the next of them, so that after any number of epochs no row was shown more than once more than another of its source
    and pool. The epoch's segments are shuffled and laid out in as many lanes as a step takes rows; each step takes one
    row of each lane. A lane passes through its rows window by window, in random order within a window. So a step mixes
    rows of places far apart, and whoever reads a few lanes reads few blocks at a time.

    Args:
        pools: Rows to draw from, by source: one pool of all rows, or one for each class.
        rows_per_step: How many rows a step takes from each pool.
        seed: Seed of all shuffling.
        shuffle_buffer: Rows of the windows of all lanes together.
    """

    def __init__(
        self,
        pools: Sequence[Sequence[SourceRows]],
        rows_per_step: Sequence[int],
        seed: int,
        shuffle_buffer: int = 10_000,
    ) -> None:
        self._pools, self._rows_per_step, self._seed = pools, list(rows_per_step), seed
        self._window = max(1, shuffle_buffer // sum(rows_per_step))
        sizes = [sum(rows.weight * len(rows) for rows in pool) for pool in pools]
        self.steps_per_epoch = max(
            math.ceil(size / count - 1e-9) for size, count in zip(sizes, self._rows_per_step, strict=True)
        )
        self._shares = [self._shares_of(number) for number in range(len(pools))]
        self._cells = [[rows.cells() for rows in pool] for pool in pools]
        self._epoch = lru_cache(maxsize=len(pools))(self._make_epoch)
        self._permutation = lru_cache(maxsize=2 * sum(rows_per_step))(self._make_permutation)

    def rows_of_step(self, step: int) -> list[int]:
        """Row numbers of optimizer step ``step`` (from 0), the pools evenly interleaved."""
        epoch, place = divmod(step, self.steps_per_epoch)
        drawn = []
        for pool, count in enumerate(self._rows_per_step):
            places = [lane * self.steps_per_epoch + self._place(pool, epoch, lane, place) for lane in range(count)]
            rows = self._rows_at(pool, epoch, np.array(places))
            drawn += [((lane + 0.5) / count, pool, row) for lane, row in enumerate(rows)]
        return [row for _, _, row in sorted(drawn)]

    def _shares_of(self, pool: int) -> list[int]:
        """How many rows each source gives to an epoch of a pool, by weight."""
        wanted = [rows.weight * len(rows) for rows in self._pools[pool]]
        return shares_of(wanted, self.steps_per_epoch * self._rows_per_step[pool])

    def _rows_at(self, pool: int, epoch: int, places: Array) -> list[int]:
        plan = self._epoch(pool, epoch)
        segments = np.searchsorted(plan.stop, places, side="right")
        begins = np.where(segments > 0, plan.stop[segments - 1], 0)
        ranks, sources = plan.first[segments] + places - begins, plan.source[segments]
        rows = np.empty(len(places), np.int64)
        for source in np.unique(sources).tolist():
            rows[sources == source] = self._pools[pool][source].rows_at(ranks[sources == source])
        return [int(row) for row in rows]

    def _make_epoch(self, pool: int, epoch: int) -> _Epoch:
        sources, firsts, lengths = [], [], []
        for source, share in enumerate(self._shares[pool]):
            for first, length in self._segments(pool, source, epoch * share, (epoch + 1) * share):
                sources.append(np.full(len(first), source, np.int32))
                firsts.append(first)
                lengths.append(length)
        length = np.concatenate(lengths)
        order = np.random.default_rng([self._seed, _EPOCH, pool, epoch]).permutation(len(length))
        return _Epoch(
            np.concatenate(sources)[order], np.concatenate(firsts)[order], np.cumsum(length[order], dtype=np.int64)
        )

    def _segments(self, pool: int, source: int, start: int, stop: int) -> list[tuple[Array, Array]]:
        """The rows of a source from one place of its endless sequence to another, as first ranks and lengths."""
        cells, size = self._cells[pool][source], len(self._pools[pool][source])
        if start == stop:
            return []
        if len(cells.first) == 1:  # perhaps a few rows again and again
            borders = np.unique([start, *range(-(-start // size) * size, stop, size), stop])
            return [(borders[:-1] % size, np.diff(borders))]
        found = []
        for cycle in range(start // size, -(-stop // size)):
            order = np.random.default_rng([self._seed, _CYCLE, pool, source, cycle]).permutation(len(cells.first))
            within = max(start - cycle * size, 0), min(stop - cycle * size, size)
            found.append(_between(cells.first[order], cells.num_rows[order], *within))
        return found

    def _place(self, pool: int, epoch: int, lane: int, place: int) -> int:
        """The row of a lane that comes at ``place``."""
        # Lanes begin new windows at different steps, so that no step waits for new blocks of all of them.
        ahead = lane * self._window // self._rows_per_step[pool]
        window = (place + ahead) // self._window
        first = max(0, window * self._window - ahead)
        last = min(self.steps_per_epoch, (window + 1) * self._window - ahead)
        return first + int(self._permutation(pool, epoch, lane, window, last - first)[place - first])

    def _make_permutation(self, pool: int, epoch: int, lane: int, window: int, length: int) -> Array:
        generator = np.random.default_rng([self._seed, _WINDOW, pool, epoch, lane, window])
        return generator.permutation(length).astype(np.int32)


def shares_of(wanted: Sequence[float], total: int) -> list[int]:
    """Whole numbers that add up to a total and are in proportion, by the largest remainders.

    Whoever wants anything gets at least one, unless there are fewer than those who do.

    Example:
        >>> shares_of([5.0, 2.5, 2.5, 0.1, 0], 11), shares_of([0.1, 0.3, 0.2], 2)
        ([5, 3, 2, 1, 0], [0, 1, 1])
    """
    exact = np.array(wanted) * (total / sum(wanted))
    least = (exact > 0) & (np.count_nonzero(exact) <= total)
    shares = np.maximum(np.floor(exact + 1e-9).astype(np.int64), least)
    shares[np.argsort(shares - exact, kind="stable")[: max(0, total - int(shares.sum()))]] += 1
    for _ in range(int(shares.sum()) - total):
        shares[np.argmax(np.where(shares > least, shares - exact, -np.inf))] -= 1
    return [int(share) for share in shares]


def _between(first: Array, length: Array, start: int, stop: int) -> tuple[Array, Array]:
    """The part of some segments from one of their rows to another.

    Example:
        >>> first, length = _between(np.array([10, 50, 70]), np.array([5, 5, 5]), 3, 11)
        >>> first.tolist(), length.tolist()
        ([13, 50, 70], [2, 5, 1])
    """
    ends = np.cumsum(length)
    begins = ends - length
    kept = slice(int(np.searchsorted(ends, start, side="right")), int(np.searchsorted(begins, stop, side="left")))
    cut = np.maximum(start - begins[kept], 0)
    return first[kept] + cut, np.minimum(ends[kept], stop) - begins[kept] - cut
