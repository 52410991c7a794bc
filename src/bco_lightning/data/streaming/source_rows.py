"""The rows of one source that are drawn from, found by their rank without a list of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bco_lightning.data.streaming.blocks import Blocks

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Cells:
    """Rows of a source that stay together when they are shuffled, as ranks.

    Args:
        first: Rank of the first row of each cell.
        num_rows: Rows of each.
    """

    first: Array
    num_rows: Array


class SourceRows:
    """The rows of one source that are drawn from: all usable ones, or those of one class.

    Args:
        blocks: The blocks of the source, in order.
        num_rows: How many rows of each block there are to draw from.
        chosen: Flag of each row of all sources, those to draw from being ``flag``; ``None`` where all are.
        flag: Which, or 0 for all that have any.
        weight: Passes over them in an epoch.
    """

    def __init__(
        self, blocks: Blocks, num_rows: Array, chosen: Array | None = None, flag: int = 0, weight: float = 1.0
    ) -> None:
        self._blocks, self._num_rows = blocks, np.asarray(num_rows, np.int64)
        self._chosen, self._flag, self.weight = chosen, flag, weight
        self._first_rows = np.ascontiguousarray(blocks["first_row"])
        self._ranks = np.concatenate([[0], np.cumsum(self._num_rows)])

    def __len__(self) -> int:
        return int(self._ranks[-1])

    def cells(self) -> Cells:
        """Neighbouring blocks where they have few rows to draw from, or cannot be read apart; else each block."""
        first = self._ranks[:-1]
        # At least half as many as a block has rows in the mean, so that there are no more cells than rows need.
        enough = max(1, int(self._blocks["rows"].sum()) // max(1, len(self._blocks)) // 2)
        parts, units = first // enough, np.cumsum(self._blocks["apart"])
        kept = np.flatnonzero(self._num_rows)
        begins = (np.diff(parts[kept], prepend=-1) > 0) & (np.diff(units[kept], prepend=-1) > 0)
        begins[:1] = True
        starts = first[kept][begins]
        return Cells(starts, np.diff(np.append(starts, len(self))))

    def rows_at(self, ranks: Array) -> list[int]:
        """Numbers, over all sources, of the rows with these ranks."""
        blocks = np.searchsorted(self._ranks, ranks, side="right") - 1
        return [
            int(self._first_rows[block]) + self._place(block, rank - int(self._ranks[block]))
            for block, rank in zip(blocks.tolist(), np.asarray(ranks).tolist(), strict=True)
        ]

    def ranks_beside(self, row: int) -> range:
        """Ranks of the rows in the block of a row."""
        block = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return range(int(self._ranks[block]), int(self._ranks[block + 1]))

    def _place(self, block: int, number: int) -> int:
        """Where in a block the row is that comes after ``number`` others to draw from."""
        if self._chosen is None or self._num_rows[block] == self._blocks["rows"][block]:
            return number
        first = int(self._first_rows[block])
        flags = self._chosen[first : first + int(self._blocks["rows"][block])]
        return int(np.flatnonzero(flags == self._flag if self._flag else flags)[number])
