"""Training rows that lie tokenized in one file, as the data module uses them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from bco_lightning.data.row_counts import RowCounts
from bco_lightning.data.sampling import Pool, RowOrder
from bco_lightning.data.source import Source


@dataclass
class TableRows:
    """Rows of a table, and the order in which an epoch draws them; :class:`StreamedRows` is its like for streams.

    Args:
        dataset: The rows, memory-mapped.
        counts: What became of the rows of their sources.
        digest: Of what they say.
        sources: Where they come from; each row knows the number of its own.
        seed: Of the order.
    """

    dataset: Dataset
    counts: RowCounts
    digest: str
    sources: Sequence[Source]
    seed: int

    @property
    def num_rows(self) -> int:
        """Rows that are drawn from."""
        return len(self.dataset)

    @cached_property
    def class_counts(self) -> tuple[float, float]:
        """Thumbs-up and thumbs-down rows of an epoch, weights of sources included."""
        up, down = self._pools_by_class()
        return len(up), len(down)

    @cached_property
    def lengths(self) -> np.ndarray[Any, Any]:
        """Tokens of each row."""
        return np.asarray(pc.list_value_length(self.dataset.data.column("input_ids")))

    def order(self, rows_per_step: int, balanced: bool, group_by_prompt: bool) -> RowOrder:
        """Which rows each optimizer step trains on; it also says how many steps an epoch has."""
        if balanced:
            return RowOrder(self._pools_by_class(), [rows_per_step // 2] * 2)
        groups = np.asarray(self.dataset.data.column("prompt_key")) if group_by_prompt else None
        return RowOrder([self._pool(np.arange(self.num_rows), 0, groups)], [rows_per_step])

    def place_of(self, row_id: int) -> str:
        """File and line of a row."""
        return str(self.dataset[row_id]["place"])

    def _pools_by_class(self) -> list[Pool]:
        thumbs = np.asarray(self.dataset.data.column("thumbs_up"))
        return [self._pool(np.flatnonzero(thumbs == up), number) for number, up in enumerate((True, False))]

    def _pool(self, rows: np.ndarray[Any, Any], number: int, groups: np.ndarray[Any, Any] | None = None) -> Pool:
        sources = np.asarray(self.dataset.data.column("source"))[rows]
        weights = [source.weight for source in self.sources]
        return Pool(rows, [self.seed, number], sources, weights, groups)
