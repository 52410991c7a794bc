"""What becomes of single records, for tests."""

from __future__ import annotations

from typing import Any

from bco_lightning.batch import FeedbackRow
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
