"""Rows to train on, in a table or left in their files, and the order in which steps draw them."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_info

from bco_lightning.data.demands import pairs_of
from bco_lightning.data.options import DataOptions
from bco_lightning.data.order import RowOrder, pools_of
from bco_lightning.data.remote import public_name
from bco_lightning.data.row_sets import RowReader, RowSet, maker_of
from bco_lightning.data.stream import StreamDataset
from bco_lightning.data.table import Array
from bco_lightning.errors import FeedbackRowError


class TrainingRows:
    """Rows to train on, by how they were read and are drawn."""

    def __init__(self, row_set: RowSet, options: DataOptions, reader: RowReader, objective: Any = None) -> None:
        self.row_set, self._options, self._reader = row_set, options, reader
        self._stream = None if row_set.files is None else self._streamed(row_set.files)
        self.paired = bool(getattr(objective, "takes_pairs", False))
        self.by_prompt = bool(getattr(objective, "takes_prompts", False))
        self.with_unrelated = bool(getattr(objective, "takes_unrelated", False))
        self._pairs = pairs_of(self._table) if self.paired else None
        self.weights = [source.weight for source in options.sources("train")]
        self._by_source = {"sources": self._column("source"), "weights": self.weights}
        self.order = lru_cache(maxsize=1)(self._order)
        self._drawn = lru_cache(maxsize=1)(self._draw)  # several trials ask for the same
        pools = pools_of(self._column("thumbs_up"), options.row_seed, by_class=True, **self._by_source)
        # Of an epoch, weights of sources included.
        self.class_counts = len(pools[0]), len(pools[0 if self.paired else 1])

    @property
    def lengths(self) -> Array | None:
        """Tokens of each row; ``None`` of a stream."""
        return None if self._stream else np.asarray(pc.list_value_length(self._table.data.column("input_ids")))

    def _order(self, rows_per_step: int) -> RowOrder:
        """Which rows each optimizer step trains on; it also says how many steps an epoch has."""
        options, near = self._options, dict[str, Any]()
        if self._stream:
            near = {"regions": self._stream.regions(), "window": options.shuffle_buffer}
        elif options.group_by_prompt:
            near = {"groups": self._column("prompt_key")}
        by_class, at_once = options.balanced_sampling, 1 if self._pairs is None else 2
        pools = pools_of(self._column("thumbs_up"), options.row_seed, by_class=by_class, **self._by_source, **near)
        order = RowOrder(pools, [rows_per_step // len(pools) // at_once] * len(pools), self._pairs)
        if self.by_prompt:
            self._say_what_is_cut(order)
        return order

    def _say_what_is_cut(self, order: RowOrder) -> None:
        """Says how many prompts of the first hundred steps lie in several micro-batches of a step."""
        keys, size, cut, prompts = self._column("prompt_key"), self._options.batch_size, 0, 0
        for step in range(min(100, order.steps_per_epoch)):
            own = keys[order.rows_of_step(step)]
            before, after = own[size - 1 : -1 : size], own[size::size]  # where a micro-batch ends
            cut, prompts = cut + len(np.unique(after[before == after])), prompts + len(np.unique(own))
        if cut:
            told = f"{cut:,} of {prompts:,} prompts of the first steps are cut by the ends of micro-batches; each part"
            rank_zero_info(f"model.reward_shift: {told} has an offset of its own. A larger data.batch_size cuts fewer.")

    def _streamed(self, files: list[dict[str, Any]]) -> StreamDataset:
        formats: Any = self.row_set.counts.formats
        sources = self._options.sources("train")
        makers = [maker_of(self._options, replace(each, format=formats[each.label])) for each in sources]
        return StreamDataset(self._table, files, makers, self._reader.row_tokenizer, self._options)

    @property
    def _table(self) -> Dataset:
        return self.row_set.dataset  # another one once a column is added

    def dataset(self) -> Dataset | StreamDataset:
        """The rows by number."""
        return self._stream or self._table

    def table(self, most: int) -> Dataset:
        """The rows as a table; of a stream the usable ones of about ``most``, in a thousand runs from all over."""
        return self._drawn(most) if self._stream else self._table

    def _draw(self, most: int) -> Dataset:
        stream = cast(StreamDataset, self._stream)
        length = min(-(-most // 1000), len(stream))
        starts = np.linspace(0, len(stream) - length, -(-most // length)).astype(np.int64)
        drawn = np.unique(starts[:, None] + np.arange(length))
        sources = self._column("source")[drawn].tolist()
        return self._reader.tokenized(map(stream.row, drawn.tolist()), sources, self._options.sources("train"))

    def passes_of(self, table: Dataset) -> Array | None:
        """How often an epoch draws each row of a table of them, about; ``None`` if all alike."""
        weights = np.array(self.weights, dtype=np.float64)
        return weights[np.asarray(table.data.column("source"))] if (weights != weights[0]).any() else None

    def place_of(self, row_id: int) -> str:
        """File and line of a row."""
        return self._stream.place_of(row_id) if self._stream else str(self._table[row_id]["place"])

    def check_classes(self) -> None:
        """Says what is unusual about the classes; a FeedbackRowError if there is only one."""
        num_up, num_down = self.class_counts
        if not (num_up and num_down):
            raise FeedbackRowError(
                ", ".join(public_name(source.path) for source in self._options.sources("train")),
                f"expected thumbs of both kinds to train on, found {num_up + num_down:.0f} rows that are all "
                f"{'thumbs-up' if num_up else 'thumbs-down'}.",
                "A classifier needs both classes; for good examples alone set model.objective: sft.",
            )
        if (share := min(num_up, num_down) / (num_up + num_down)) < 0.2:
            rank_zero_info(
                f"Only {share:.0%} of the training rows are of the rarer class. model.class_weights: auto keeps the "
                "loss balanced; data.balanced_sampling: true also makes every step see both classes."
            )
        if self._options.balanced_sampling:
            (fewer, rarer), (more, _) = sorted([(num_up, "thumbs-up"), (num_down, "thumbs-down")])
            rank_zero_info(
                f"balanced sampling: an epoch draws {more:.0f} rows of each class; the {fewer:.0f} of {rarer} are "
                f"drawn {more / fewer:.2f} times each, none more than once oftener than another"
            )

    def _column(self, name: str) -> Array:
        """What is known of each row that is drawn; of pairs, which are drawn as one, of the better row."""
        values = np.asarray(self._table.data.column(name))
        return values if self._pairs is None else values[self._pairs[:, 0]]


def telling_rows(table: Dataset | None) -> list[dict[str, Any]]:
    """Rows that tell most: the shortest, the longest, the first of each source, those with most and fewest images."""
    if table is None or not len(table):
        return []
    firsts = np.unique(np.asarray(table.data.column("source")), return_index=True)[1]
    chosen = set(firsts.tolist())
    for name in {"input_ids", "images"}.intersection(table.column_names):
        lengths = np.asarray(pc.list_value_length(table.data.column(name)))
        chosen |= {int(lengths.argmin()), int(lengths.argmax())}
    return [table[number] for number in sorted(chosen)]
