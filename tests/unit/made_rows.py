"""What becomes of records, for tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bco_lightning.batch import FeedbackRow
from bco_lightning.data.files import expand
from bco_lightning.data.records import record_file
from bco_lightning.data.records.csv_rows import thumb_in
from bco_lightning.data.rows import RatedRow, RowFormat, RowMaker
from bco_lightning.errors import FeedbackRowError


def made(record: Any, options: RowFormat | None = None, labelled: bool = True) -> list[RatedRow]:
    """The rows of a record that is the first and only one of its source, at ``x:1``."""
    maker = RowMaker(options or RowFormat(), labelled)
    maker.learn(iter([("x:1", record)]))
    return maker.rows(record, "x:1")


def row_of(record: Any, options: RowFormat | None = None, labelled: bool = True) -> FeedbackRow:
    """The only row of a record.

    Raises:
        FeedbackRowError: If it is malformed.
    """
    [row] = made(record, options, labelled)
    if isinstance(row, FeedbackRowError):
        raise row
    assert isinstance(row, FeedbackRow), row
    return row


def records_of(source: str, cells: Mapping[str, Callable[[str], Any]] | None = None) -> Iterator[tuple[str, Any]]:
    """All records of a source, or what is wrong with them, with file and line; of a CSV, labels are thumbs."""
    for path in expand(source):
        file = record_file(path, {"label": thumb_in} if cells is None else cells)
        for place, record in file:
            yield f"{file.name}:{place.line}", record


def rows_of(source: str, maker: RowMaker) -> Iterator[RatedRow]:
    """What becomes of all records of a source."""
    for place, record in maker.learn(records_of(source, maker.cells)):
        yield from [record] if isinstance(record, FeedbackRowError) else maker.rows(record, place)
    maker.check_rated()
