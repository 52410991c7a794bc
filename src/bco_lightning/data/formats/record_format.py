"""What every format of records has in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from bco_lightning.batch import FeedbackRow, LeftOut
from bco_lightning.data.source import NO_FEEDBACK, RowFormat

__all__ = ["NO_ANSWER", "NO_FEEDBACK", "NO_PROMPT", "WITH_IMAGE", "Candidate", "RecordFormat"]

NO_ANSWER = "no answer that holds text"
NO_PROMPT = "answer without a prompt"
WITH_IMAGE = "conversation with an image"


@dataclass(frozen=True)
class Candidate:
    """A row with its label as it stands in the source.

    Args:
        row: Without a thumb yet; with one where the format itself says which answer is good.
        label: A word, a number or a boolean in the source's vocabulary.
        ratings: Every rating of the record by name, for a rule to choose from; the label's own under its column.
    """

    row: FeedbackRow
    label: Any
    ratings: Mapping[str, Any]


class RecordFormat(Protocol):
    """Makes rows of records, one record at a time.

    Attributes:
        rows_per_record: Rows of each record, read or left out; ``None`` where records differ.
    """

    rows_per_record: int | None

    def matches(self, record: Mapping[str, Any], options: RowFormat) -> bool:
        """Whether a record looks like one of this format."""

    def candidates(
        self, record: Mapping[str, Any], place: str, options: RowFormat, *, labelled: bool
    ) -> Iterator[Candidate | LeftOut]:
        """The rows of one record, each to be used or left out.

        Args:
            record: One of the log.
            place: File and line, for messages; rows of one record have the same.
            options: Columns, rule of ratings, and which turns carry loss.
            labelled: Whether rows need a label; without, a row that has none is used as it is.

        Raises:
            FeedbackRowError: If the record is malformed, or a column is missing.
        """
