"""A data set that is read while it is trained on, as the data module uses it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from bco_lightning.batch import LeftOut
from bco_lightning.data.loading import BadRows
from bco_lightning.data.reading import ReadingOptions
from bco_lightning.data.remote import public_name
from bco_lightning.data.row_counts import Counted, RowCounts
from bco_lightning.data.source import Source
from bco_lightning.data.streaming.blocks import BLOCK_BYTES, BLOCK_ROWS
from bco_lightning.data.streaming.dataset import Outcome, StreamDataset, TokenizedRow
from bco_lightning.data.streaming.index import StreamIndex
from bco_lightning.data.streaming.order import StreamOrder
from bco_lightning.data.streaming.preview import Preview, outcomes_of_rows, preview
from bco_lightning.data.streaming.scanning import Dialect
from bco_lightning.errors import ConfigError, FeedbackRowError

_SAMPLED_BLOCKS = 2048
_LEAST_CACHE_BYTES = 2**23


@dataclass
class StreamedRows:
    """Training rows that stay in their files.

    Args:
        index: Where they are.
        counts: What became of the rows that were read in advance: all, or a sample.
        options: What rows depend on.
        classes: Thumbs-up and thumbs-down of each source among those rows, also of rows that tokens alone make
            unusable: each of these is replaced by one of its class.
        expected: What will become of rows when their turn comes, in words; may be empty.
    """

    index: StreamIndex
    counts: RowCounts
    options: ReadingOptions
    classes: dict[str, tuple[int, int]]
    expected: str = ""

    @classmethod
    def read(
        cls,
        name: str,
        sources: Sequence[Source],
        options: ReadingOptions,
        tokenizer: Any,
        sample: int | None = None,
        processes: int | None = None,
    ) -> StreamedRows:
        """Finds the rows.

        Args:
            name: Of the data set.
            sources: Their files are JSON lines, Parquet or Arrow folders.
            options: What rows depend on.
            tokenizer: A transformers tokenizer.
            sample: How many rows to read in advance, drawn evenly; all of them if left out.
            processes: How many read; if left out, as many as there are processors for.

        Raises:
            FeedbackRowError: On a file that cannot be streamed, a malformed row among those read, or if none of these
                can be used, of a class too, or a sample has one class alone.
            ConfigError: On options that need all rows at once.
        """
        if options.conflicts != "keep":
            raise ConfigError(
                "data.conflicts",
                f"expected keep with data.streaming, which does not compare rows, found {options.conflicts}.",
            )
        if sample is not None and sample < 1:
            raise ConfigError("data.streaming_sample", f"expected at least 1 row, found {sample}.")
        if sample is None:
            rank_zero_info(f"{name}: all rows are read once before the first step, unless data.streaming_sample is set")
        bad_rows = BadRows(options.bad_rows, options.max_bad_rows)
        index = StreamIndex.build(
            sources,
            [options.format_of(source) for source in sources],
            name=name,
            bad_rows=bad_rows,
            read_rows=sample is None,
            processes=processes,
        )
        dataset = StreamDataset(index, tokenizer, options, cache_bytes=_LEAST_CACHE_BYTES)
        if sample is None:
            counts = index.counts
            counts.require_used()
            found = preview(dataset)
            found.check()
        else:
            counts, found = _read_sample(dataset, sample, bad_rows)
            _check_sample(counts, found, index)
        return cls(index, counts, options, counts.by_source if sample is None else found.by_source, str(found))

    @property
    def digest(self) -> str:
        """SHA-256 of the files' content and all that decides which rows they hold."""
        return self.index.digest

    @property
    def is_sampled(self) -> bool:
        """Whether only a sample was read in advance, so that ``counts`` and ``class_counts`` are estimates."""
        return self.index.flags is None

    @property
    def num_rows(self) -> int:
        """Rows that are drawn from: the usable ones where all were read, else all."""
        return self.index.num_rows if self.is_sampled else self.counts.used

    @property
    def class_counts(self) -> tuple[float, float]:
        """Thumbs-up and thumbs-down rows of an epoch, weights of sources included; of a sample, its own."""
        total = np.sum(list(self.classes.values()), axis=0).tolist()
        up = down = 0.0
        for source, size in zip(self.index.sources, self._sizes(), strict=True):
            known = self.classes[source.label]
            of_up, of_down = known if sum(known) else total
            rows = source.weight * size / (of_up + of_down)
            up, down = up + rows * of_up, down + rows * of_down
        return up, down

    def _sizes(self) -> list[int]:
        return [len(rows) for rows in self.index.pools(by_class=False)[0]]

    def order(self, rows_per_step: int, balanced: bool, shuffle_buffer: int) -> StreamOrder:
        """Which rows each optimizer step trains on; it also says how many steps an epoch has.

        Raises:
            ConfigError: If steps are to be balanced, and the class of each row is not known.
        """
        counts = [rows_per_step // 2] * 2 if balanced else [rows_per_step]
        return StreamOrder(self.index.pools(balanced), counts, self.options.seed, shuffle_buffer)

    def dataset(
        self,
        tokenizer: Any,
        rows_per_step: int,
        rows_of_rank: int,
        balanced: bool,
        shuffle_buffer: int,
        with_words: bool = False,
    ) -> StreamDataset:
        """The rows by number.

        Args:
            tokenizer: A transformers tokenizer.
            rows_per_step: Of all processes.
            rows_of_rank: Rows of a step in this process.
            balanced: Whether classes are drawn apart.
            shuffle_buffer: As the order has it.
            with_words: Whether rows come with the words of their prompt.
        """
        in_memory = (shuffle_buffer / rows_per_step + 2 * BLOCK_ROWS) * rows_of_rank
        cache_bytes = max(_LEAST_CACHE_BYTES, int(2 * in_memory * self._bytes_per_row()))
        return StreamDataset(
            self.index, tokenizer, self.options, by_class=balanced, cache_bytes=cache_bytes, with_words=with_words
        )

    def sample(self, tokenizer: Any, count: int) -> Iterator[TokenizedRow]:
        """About so many rows, drawn evenly from all over, as far as they are usable.

        Raises:
            FeedbackRowError: If a file cannot be read any more.
        """
        dataset = StreamDataset(self.index, tokenizer, self.options, cache_bytes=_LEAST_CACHE_BYTES)
        outcomes = outcomes_of_rows(dataset, draw_evenly(self.index, count, self.options.seed))
        return (outcome for _, outcome in outcomes if isinstance(outcome, TokenizedRow))

    def told(self) -> dict[str, Any]:
        """Plain values by which another process of this node has the same rows."""
        return {
            "counts": asdict(self.counts),
            "classes": self.classes,
            "digest": self.digest,
            "index": self.index.told(),
        }

    @classmethod
    def shared(cls, told: dict[str, Any], sources: Sequence[Source], options: ReadingOptions) -> StreamedRows:
        """The rows that another process of this node has found.

        Raises:
            FaultError: If its index cannot be seen from here.
        """
        formats = [options.format_of(source) for source in sources]
        index = StreamIndex.shared(told["index"], sources, formats)
        classes = {label: (up, down) for label, (up, down) in told["classes"].items()}
        return cls(index, RowCounts.from_values(told["counts"]), options, classes)

    def _bytes_per_row(self) -> float:
        """At most so many in the mean, as blocks are limited in bytes and rows."""
        return BLOCK_BYTES * len(self.index.blocks) / self.index.num_rows

    def __str__(self) -> str:
        sampled = (
            f"  estimates from {self.counts.read} of {self.index.num_rows} rows, drawn evenly (data.streaming_sample)"
        )
        return "\n".join(filter(None, [str(self.counts), sampled if self.is_sampled else "", self.expected]))


def draw_evenly(index: StreamIndex, count: int, seed: int) -> list[int]:
    """Numbers of rows from all over an index, a few of each block that is drawn from, in order.

    Args:
        index: Where the rows are.
        count: About how many; each source gives at least one.
        seed: Of the choice.
    """
    blocks = index.blocks
    random = np.random.default_rng([seed, count])
    num_blocks = min(len(blocks), count, _SAMPLED_BLOCKS)
    # One block of each of as many runs of blocks, and of it as many rows as are due to the run.
    runs = np.linspace(0, len(blocks), num_blocks + 1).astype(np.int64)
    due = np.append(blocks["first_row"], index.num_rows)[runs] * count // index.num_rows
    drawn: set[int] = set()
    for (start, stop), wanted in zip(pairwise(runs.tolist()), np.diff(due).tolist(), strict=True):
        block = blocks[random.integers(start, stop)]
        drawn.update((int(block["first_row"]) + random.permutation(int(block["rows"]))[:wanted]).tolist())
    firsts = blocks["first_row"][np.unique(blocks["source"], return_index=True)[1]]
    found = np.searchsorted(sorted(drawn), np.append(firsts, index.num_rows))
    return sorted(drawn.union(firsts[np.diff(found) == 0].tolist()))


def _read_sample(dataset: StreamDataset, count: int, bad_rows: BadRows) -> tuple[RowCounts, Preview]:
    """What becomes of some rows; afterwards the index knows the vocabulary that they speak."""
    index, found = dataset.index, Preview(dataset.index)
    counts = RowCounts(index.counts.name, by_source={source.label: (0, 0) for source in index.sources})
    for number, outcome in outcomes_of_rows(dataset, draw_evenly(index, count, dataset.options.seed)):
        _count(outcome, counts, index, bad_rows)
        found.take(number, dataset.flag_of(number), outcome)
    bad_rows.check([public_name(source.path) for source in index.sources], counts.read)
    index.dialects = [Dialect.of(parser) for parser in dataset.parsers]
    return counts, found


def _check_sample(counts: RowCounts, found: Preview, index: StreamIndex) -> None:
    """Refuses a sample without usable rows, at all or of a class, and one that cannot tell the shares of classes."""
    is_part = counts.read < index.num_rows
    remedy = "Raise data.streaming_sample, or leave it out to read all rows." if is_part else ""
    counts.require_used(remedy)
    found.check(", or read more rows in advance (data.streaming_sample)" if is_part else "")
    if is_part and not (counts.up and counts.down):
        raise FeedbackRowError(
            ", ".join(public_name(source.path) for source in index.sources),
            f"expected thumbs of both kinds in a sample of {counts.read} of {index.num_rows} rows, found "
            f"{counts.used} that are all {'thumbs-up' if counts.up else 'thumbs-down'}.",
            remedy,
        )


def _count(outcome: Outcome, counts: RowCounts, index: StreamIndex, bad_rows: BadRows) -> None:
    if isinstance(outcome, FeedbackRowError):
        bad_rows.take(outcome)
        counts.skip(Counted(1, [outcome.where]))
    elif isinstance(outcome, LeftOut):
        counts.leave_out(outcome.reason, Counted(1, [outcome.place]))
    else:
        up = bool(outcome.row.thumbs_up)
        counts.read, counts.up, counts.down = counts.read + 1, counts.up + up, counts.down + (not up)
        label = index.sources[outcome.source].label
        before = counts.by_source[label]
        counts.by_source[label] = before[0] + up, before[1] + (not up)
        for what, is_cut in _cuts_of(outcome).items():
            counts.cut[what] = counts.cut.get(what, 0) + is_cut


def _cuts_of(found: TokenizedRow) -> dict[str, bool]:
    return {
        "prompts cut": found.sample.prompt_cut,
        "completions cut": found.sample.completion_cut,
        "messages after the rated turn left out": bool(found.row.num_trailing),
    }
