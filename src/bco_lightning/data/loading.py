"""From sources to a table of tokenized rows, a few hundred rows in memory at a time."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

from bco_lightning.batch import FeedbackRow, TokenizedSample
from bco_lightning.data.feedback_row import Columns, LabelVocabulary, label_of, parse_row, rated
from bco_lightning.data.readers import Record, read_records
from bco_lightning.data.row_table import RowTable
from bco_lightning.data.tokenization import RowTokenizer
from bco_lightning.errors import FeedbackRowError

BadRowPolicy = Literal["strict", "skip"]
_BATCH_ROWS, _BATCH_CHARACTERS = 128, 2**20
_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


@dataclass
class BadRows:
    """What to do with malformed rows, and which there were.

    Args:
        policy: ``strict`` raises at the first one; ``skip`` leaves them out.
        max_share: Share of the rows read above which ``skip`` raises too.
    """

    policy: BadRowPolicy = "strict"
    max_share: float = 0.001
    count: int = 0
    first: list[FeedbackRowError] = field(default_factory=list)

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
class _Unrated:
    """A row with its label as it stands in the source; it is read once the row is known to be used."""

    row: FeedbackRow
    label: Any
    sample: TokenizedSample | None = None


class RowLoader:
    """Reads, validates and tokenizes sources.

    Args:
        columns: Names of the columns.
        row_tokenizer: Makes token ids of a row.
        bad_rows: Takes the malformed rows.
        labelled: Whether rows need a label.
    """

    def __init__(self, columns: Columns, row_tokenizer: RowTokenizer, bad_rows: BadRows, labelled: bool) -> None:
        self._columns, self._row_tokenizer = columns, row_tokenizer
        self._bad_rows, self._labelled = bad_rows, labelled

    def load(self, sources: list[str], table: RowTable) -> Counter[str]:
        """Appends the rows of all sources to ``table``.

        Returns:
            The number of valid rows of each source.

        Raises:
            FeedbackRowError: On a source without rows, a malformed source, or malformed rows unless they are skipped.
        """
        rows_of: Counter[str] = Counter()
        for source in sources:
            bad_before, rows_before = self._bad_rows.count, len(table)
            self._load_source(source, table)
            rows_of[source] += len(table) - rows_before
            if len(table) == rows_before and self._bad_rows.count == bad_before:
                raise FeedbackRowError(source, "expected at least one row, found none.")
        self._bad_rows.check(sources, len(table) + self._bad_rows.count)
        return rows_of

    def _load_source(self, source: str, table: RowTable) -> None:
        labels = LabelVocabulary(thumbs=self._columns.thumbs)
        # Tokenizing leaves the interpreter free, so the next rows are read meanwhile.
        for outcome in _one_ahead(self._tokenized, _batches(self._rows(source))):
            try:
                if isinstance(outcome, FeedbackRowError):
                    raise outcome
                row = rated(outcome.row, outcome.label, labels) if self._labelled else outcome.row
            except FeedbackRowError as error:
                self._bad_rows.take(error)
            else:
                table.append(row, outcome.sample)

    def _rows(self, source: str) -> Iterator[_Unrated | FeedbackRowError]:
        label_column = None if self._columns.thumbs else self._columns.label
        for place, record in read_records(source, label_column):
            outcome = record if isinstance(record, FeedbackRowError) else self._parsed(record, place)
            yield outcome
            if isinstance(outcome, FeedbackRowError) and self._bad_rows.policy == "strict":
                return

    def _parsed(self, record: Record, place: str) -> _Unrated | FeedbackRowError:
        try:
            row = parse_row(record, place, self._columns, labels=None)
            return _Unrated(row, label_of(record, place, self._columns) if self._labelled else None)
        except FeedbackRowError as error:
            return error.without_cause()

    def _tokenized(self, batch: list[_Unrated | FeedbackRowError]) -> list[_Unrated | FeedbackRowError]:
        samples = iter(self._row_tokenizer.tokenize_batch([item.row for item in batch if isinstance(item, _Unrated)]))
        outcomes = [next(samples) if isinstance(item, _Unrated) else item for item in batch]
        return [
            _Unrated(item.row, item.label, outcome)
            if isinstance(item, _Unrated) and not isinstance(outcome, FeedbackRowError)
            else cast("FeedbackRowError", outcome)
            for item, outcome in zip(batch, outcomes, strict=True)
        ]


def _batches(rows: Iterable[_Unrated | FeedbackRowError]) -> Iterator[list[_Unrated | FeedbackRowError]]:
    batch: list[_Unrated | FeedbackRowError] = []
    characters = 0
    for row in rows:
        batch.append(row)
        if isinstance(row, _Unrated):
            characters += sum(len(message["content"]) for message in row.row.prompt + row.row.completion)
        if len(batch) >= _BATCH_ROWS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _one_ahead(function: Callable[[_Item], list[_Made]], items: Iterable[_Item]) -> Iterator[_Made]:
    """What ``function`` makes of each item, made in a thread while the next item is fetched."""
    with ThreadPoolExecutor(max_workers=1) as worker:
        waiting: deque[Future[list[_Made]]] = deque()
        for item in items:
            waiting.append(worker.submit(function, item))
            if len(waiting) > 1:
                yield from waiting.popleft().result()
        if waiting:
            yield from waiting.popleft().result()
