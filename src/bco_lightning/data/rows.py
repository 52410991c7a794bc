"""From records to rated rows: the one way that tables and streams take."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import TypeVar

from bco_lightning.batch import FeedbackRow, LeftOut
from bco_lightning.data.formats import FORMATS, format_of
from bco_lightning.data.formats.record_format import Candidate, Origin, RowFormat
from bco_lightning.data.labels import LabelVocabulary, thumb_by_rule
from bco_lightning.data.records import Record, read_records
from bco_lightning.errors import FeedbackRowError

__all__ = ["RatedRow", "RowFormat", "RowMaker", "rated_rows"]

RatedRow = FeedbackRow | LeftOut | FeedbackRowError
# Records without the marks of any format that may come before the first with some.
_MOST_UNCLEAR = 100
_Place = TypeVar("_Place")


class RowMaker:
    """Makes rated rows of the records of one source, which have one format and speak one vocabulary.

    It pickles with what it has learned.

    Args:
        options: How records become rows.
        labelled: Whether rows need a label; without, each is given as it is, and its thumb only where the format says.

    Attributes:
        format: Name of the format; ``None`` before :meth:`learn` where it is ``auto``.
        labels: The vocabulary, narrowed down by every row.
    """

    def __init__(self, options: RowFormat, labelled: bool = True) -> None:
        self.options, self.labelled = options, labelled
        self.format: str | None = options.format if options.format in FORMATS else None
        self.labels = LabelVocabulary(thumbs=options.columns.thumbs)

    @property
    def label_column(self) -> str | None:
        """The column whose cells a CSV means as booleans and numbers, if labels are not mapped as they are written."""
        return None if self.options.columns.thumbs else self.options.columns.label

    @property
    def numeric_columns(self) -> frozenset[str]:
        """Columns whose cells a CSV means as numbers: those of the rule of ratings."""
        rating = self.options.rating
        return frozenset({rating.column or self.options.columns.label, *rating.untouched} if rating else ())

    def learn(
        self, records: Iterator[tuple[_Place, Record | FeedbackRowError]]
    ) -> Iterator[tuple[_Place, Record | FeedbackRowError]]:
        """Finds out the format, where it is ``auto``, by the first record that looks like one of some format.

        Args:
            records: All of the source, from its first.

        Returns:
            The same records, those included that were looked at.

        Raises:
            ConfigError: If that record may be a rated row as well as a pair.
        """
        seen: list[tuple[_Place, Record | FeedbackRowError]] = []
        while self.format is None and (item := next(records, None)) is not None:
            seen.append(item)
            # A first record that is malformed says nothing about the others.
            if not isinstance(item[1], FeedbackRowError):
                self.format = format_of(item[1], self.options.columns)
            if len(seen) > _MOST_UNCLEAR:
                break
        self.format = self.format or "unpaired"
        return chain(seen, records)

    def rows(self, record: Record, place: str) -> list[RatedRow]:
        """The rows of one record, each with its thumb; what is malformed comes as an error, and nothing after it."""
        rows: list[RatedRow] = []
        origin = Origin(place, self.options, self.labelled)
        try:
            for item in FORMATS[self.format or "unpaired"].candidates(record, origin):
                rows.append(self._rated(item) if isinstance(item, Candidate) else item)
        except FeedbackRowError as error:
            rows.append(error.without_cause())
        return rows

    def _rated(self, candidate: Candidate) -> FeedbackRow | LeftOut:
        row, rule = candidate.row, self.options.rating
        if not self.labelled or row.thumbs_up is not None:
            return row
        if rule is not None:
            thumb = thumb_by_rule(rule, candidate.ratings, self.options.columns.label, row.place)
        else:
            thumb = self.labels.thumbs_up(candidate.label, row.place)
        if isinstance(thumb, LeftOut):
            return thumb
        # Four times as fast as dataclasses.replace, and this is done for every row.
        return FeedbackRow(
            row.prompt, row.completion, thumb, row.place, row.tools, row.template_options, row.num_trailing
        )


def rated_rows(source: str, maker: RowMaker) -> Iterator[RatedRow]:
    """All rows of a source, read from the front to the end.

    Args:
        source: As :func:`~bco_lightning.data.records.read_records` takes it.
        maker: Makes them.

    Raises:
        FeedbackRowError: If there is no such source, or a file is malformed as a whole.
    """
    for place, record in maker.learn(read_records(source, maker.label_column, maker.numeric_columns)):
        yield from [record] if isinstance(record, FeedbackRowError) else maker.rows(record, place)
