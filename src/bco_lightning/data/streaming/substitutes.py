"""Rows that take the place of unusable ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np

from bco_lightning.data.streaming.index import StreamIndex
from bco_lightning.data.streaming.source_rows import SourceRows

_TRIES_BESIDE, _TRIES_IN_SOURCE, TRIES = 4, 50, 1000


class Substitutes:
    """Chooses other rows by the seed and the number of a row alone.

    A row of a class is only ever replaced by one of its class, so that the shares of the classes stay, and with them
    the class weights; and by one of its source, unless that has hardly any that is usable.

    Args:
        index: Where the rows are.
        seed: Of the choice.
        flag_of: Gives the flag of a row, which may have to be read for it.
    """

    def __init__(self, index: StreamIndex, seed: int, flag_of: Callable[[int], int]) -> None:
        self._index, self._seed, self._flag_of = index, seed, flag_of
        self._rows = lru_cache(maxsize=None)(index.source_rows)

    def of(self, number: int) -> Iterator[int]:
        """Rows to try one after another, those that are at hand first; at most ``TRIES``."""
        flag = self._flag_of(number)
        for attempt in range(1, TRIES + 1):
            other = self._draw(number, flag, attempt)
            if other is not None:
                yield other
                flag = flag or self._flag_of(other)  # of a row without a class, the first one tried has the class

    def _draw(self, number: int, flag: int, attempt: int) -> int | None:
        random = np.random.default_rng([self._seed, number, attempt])
        rows = self._source(number, flag, attempt, random)
        beside = rows.ranks_beside(number) if attempt <= _TRIES_BESIDE else range(0)
        ranks = beside if len(beside) > 1 else range(len(rows))
        if not ranks:
            return None
        [other] = rows.rows_at(np.array([ranks[int(random.integers(len(ranks)))]]))
        return other if self._index.flags is not None or not flag else self._next_like(other, number, flag)

    def _source(self, number: int, flag: int, attempt: int, random: np.random.Generator) -> SourceRows:
        """The rows of the source of a row, or of another source, the larger ones more often."""
        own = self._rows(self._index.source_of(number), flag)
        if attempt <= min(_TRIES_IN_SOURCE, _TRIES_BESIDE * (len(own) - 1)):
            return own
        every = [self._rows(source, flag) for source in range(len(self._index.sources))]
        ends = np.cumsum([len(rows) for rows in every])
        return every[int(np.searchsorted(ends, random.integers(max(1, ends[-1])), side="right"))] if ends[-1] else own

    def _next_like(self, first: int, replaced: int, flag: int) -> int | None:
        """From a row on, the next one of its block that turns out to be of a class."""
        block = self._index.blocks[self._index.block_of(first)]
        start, size = int(block["first_row"]), int(block["rows"])
        numbers = (start + (first - start + step) % size for step in range(size))
        return next((number for number in numbers if number != replaced and self._flag_of(number) == flag), None)
