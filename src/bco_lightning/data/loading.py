"""From sources to a table of tokenized rows, a few hundred rows in memory at a time."""

from __future__ import annotations

import gc
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeVar, cast, get_args

from bco_lightning.batch import LeftOut, TokenizedSample
from bco_lightning.data.formats.record_format import Candidate
from bco_lightning.data.parsing import Parsed, RecordParser
from bco_lightning.data.records import read_records
from bco_lightning.data.remote import public_name
from bco_lightning.data.row_counts import Counted
from bco_lightning.data.row_table import RowTable
from bco_lightning.data.source import RowFormat, Source
from bco_lightning.data.tokenize import RowTokenizer
from bco_lightning.errors import FeedbackRowError, check_choice

BadRowPolicy = Literal["strict", "skip"]
_BATCH_ROWS, _BATCH_CHARACTERS = 128, 2**20
# Rows are many small objects without cycles; looking for some after every 700 of them took a fifth of the time.
_COLLECT_AFTER = (50_000, 20, 50)
_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


@dataclass
class BadRows:
    """What to do with malformed rows, and which there were.

    Args:
        policy: ``strict`` raises at the first one; ``skip`` leaves them out.
        max_share: Share of the rows read above which ``skip`` raises too.

    Raises:
        ConfigError: If there is no such policy.
    """

    policy: BadRowPolicy = "strict"
    max_share: float = 0.001
    count: int = 0
    first: list[FeedbackRowError] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_choice("data.bad_rows", self.policy, get_args(BadRowPolicy))

    @property
    def places(self) -> list[str]:
        """Where the first three of them stand."""
        return [error.where for error in self.first]

    def take(self, error: FeedbackRowError) -> None:
        """Takes note of one.

        Raises:
            FeedbackRowError: This one, if they are not to be skipped.
        """
        if self.policy == "strict":
            raise error
        self.count += 1
        self.first = [*self.first, error][:3]

    def check(self, sources: list[str], rows_read: int) -> None:
        """Refuses sources of which too much is malformed.

        Raises:
            FeedbackRowError: Naming the first places.
        """
        if self.count > self.max_share * rows_read:
            raise FeedbackRowError(
                ", ".join(sources),
                f"expected at most {self.max_share:.2%} malformed rows (data.max_bad_rows), found {self.count} of "
                f"{rows_read}, the first of them at {', '.join(self.places)}.",
                f"The first reads: {self.first[0]}",
            ) from self.first[0]


@dataclass
class Loaded:
    """What was met besides the rows of the table.

    Args:
        rows_of: Valid rows of each source, those included that are too long or were given the rule's no.
        left_out: Rows without tokens that are left out, by reason.
        formats: The format that the records of each source were read as.
    """

    rows_of: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, Counted] = field(default_factory=dict)
    formats: dict[str, str] = field(default_factory=dict)


@dataclass
class _Tokenized:
    """A row, not rated yet, and what became of it as tokens."""

    candidate: Candidate
    outcome: TokenizedSample | LeftOut


class RowLoader:
    """Reads, validates and tokenizes sources.

    Args:
        format_of: How the records of a source become rows.
        row_tokenizer: Makes token ids of a row.
        bad_rows: Takes the malformed rows.
        labelled: Whether rows need a label.
    """

    def __init__(
        self,
        format_of: Callable[[Source], RowFormat],
        row_tokenizer: RowTokenizer,
        bad_rows: BadRows,
        labelled: bool = True,
    ) -> None:
        self._format_of, self._row_tokenizer = format_of, row_tokenizer
        self._bad_rows, self._labelled = bad_rows, labelled

    def load(self, sources: Sequence[Source], table: RowTable) -> Loaded:
        """Appends the rows of all sources to ``table``.

        Returns:
            What else there was.

        Raises:
            FeedbackRowError: On a source without rows, a malformed source, or malformed rows unless they are skipped.
        """
        loaded = Loaded()
        for number, source in enumerate(sources):
            rows_before, others_before = len(table), self._num_others(loaded)
            with _rare_collections():
                self._load_source(source, number, table, loaded)
            loaded.rows_of[source.label] += len(table) - rows_before
            if len(table) == rows_before and self._num_others(loaded) == others_before:
                raise FeedbackRowError(public_name(source.path), "expected at least one row, found none.")
        rows_read = len(table) + self._num_others(loaded)
        self._bad_rows.check([public_name(source.path) for source in sources], rows_read)
        return loaded

    def _num_others(self, loaded: Loaded) -> int:
        return self._bad_rows.count + sum(counted.count for counted in loaded.left_out.values())

    def _load_source(self, source: Source, number: int, table: RowTable, loaded: Loaded) -> None:
        parser = RecordParser(self._format_of(source), self._labelled)
        # Tokenizing leaves the interpreter free, so the next rows are read meanwhile.
        for item in _ahead(self._tokenized, _batches(self._parsed(source, parser))):
            try:
                if isinstance(item, FeedbackRowError):
                    raise item
                row = parser.rated(item.candidate) if isinstance(item, _Tokenized) else item
            except FeedbackRowError as error:
                self._bad_rows.take(error)
                continue
            if isinstance(row, LeftOut):
                loaded.left_out.setdefault(row.reason, Counted()).add(row.place)
            else:
                table.append(row, cast("_Tokenized", item).outcome, number)
        loaded.formats[source.label] = parser.format_name

    def _parsed(self, source: Source, parser: RecordParser) -> Iterator[Parsed]:
        for place, record in read_records(source.path, parser.label_column, parser.numeric_columns):
            parsed = [record] if isinstance(record, FeedbackRowError) else parser.candidates(record, place)
            for item in parsed:
                yield item
                if isinstance(item, FeedbackRowError) and self._bad_rows.policy == "strict":
                    return

    def _tokenized(self, batch: list[Parsed]) -> list[_Tokenized | LeftOut | FeedbackRowError]:
        outcomes = iter(self._row_tokenizer.tokenize_batch([item.row for item in batch if isinstance(item, Candidate)]))
        items: list[_Tokenized | LeftOut | FeedbackRowError] = []
        for item in batch:
            outcome = next(outcomes) if isinstance(item, Candidate) else item
            if isinstance(item, Candidate) and not isinstance(outcome, FeedbackRowError):
                items.append(_Tokenized(item, outcome))
            else:
                items.append(cast("LeftOut | FeedbackRowError", outcome))
        return items


def _batches(items: Iterable[Parsed]) -> Iterator[list[Parsed]]:
    batch: list[Parsed] = []
    characters = 0
    for item in items:
        batch.append(item)
        if isinstance(item, Candidate):
            messages = (*item.row.prompt, *item.row.completion)
            characters += sum(len(message.get("content") or "") for message in messages)
        if len(batch) >= _BATCH_ROWS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _ahead(function: Callable[[_Item], list[_Made]], items: Iterable[_Item]) -> Iterator[_Made]:
    """What ``function`` makes of each item, made in a thread while the next item is fetched."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        waiting: deque[Future[list[_Made]]] = deque()
        for item in items:
            waiting.append(thread.submit(function, item))
            if len(waiting) > 1:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


@contextmanager
def _rare_collections() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(*_COLLECT_AFTER)
    try:
        yield
    finally:
        gc.set_threshold(*before)
