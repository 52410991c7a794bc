"""From records to rated rows: the one way that tables and streams take."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import TypeVar

from bco_lightning.batch import FeedbackRow, LeftOut
from bco_lightning.data.formats import FORMATS, format_of
from bco_lightning.data.formats.record_format import Candidate, Origin, RowFormat
from bco_lightning.data.labels import LabelVocabulary, thumb_by_rule
from bco_lightning.data.records.csv_rows import Cells, number_in, thumb_in
from bco_lightning.data.values import Record
from bco_lightning.errors import FeedbackRowError

__all__ = ["RatedRow", "RowFormat", "RowMaker"]

RatedRow = FeedbackRow | LeftOut | FeedbackRowError
# Records without the marks of any format that may come before the first with some.
_MOST_UNCLEAR = 100
_Place = TypeVar("_Place")
_Records = Iterator[tuple[_Place, Record | FeedbackRowError]]


class RowMaker:
    """Makes rated rows of the records of one source, which have one format and speak one vocabulary.

    It pickles with what it has learned: the ``format``, ``None`` before that where it is ``auto``, and the vocabulary.

    Args:
        options: How records become rows.
        labelled: Whether rows need a label; without, each is given as it is, and its thumb only where the format says.
    """

    def __init__(self, options: RowFormat, labelled: bool = True) -> None:
        self.options, self.labelled = options, labelled
        self.format: str | None = options.format if options.format in FORMATS else None
        self.labels = LabelVocabulary(options.columns.thumbs)

    @property
    def cells(self) -> Cells:
        """What the cells of a CSV mean, by column: thumbs, unless labels are mapped as they stand, and ratings."""
        columns, rule = self.options.columns, self.options.rating
        rated = (rule.column or columns.label, *rule.untouched) if rule else ()
        return {**({} if columns.thumbs else {columns.label: thumb_in}), **dict.fromkeys(rated, number_in)}

    def learn(self, records: _Records[_Place]) -> _Records[_Place]:
        """Finds out the format, where it is ``auto``, by the first record that looks like one; gives all records."""
        seen: list[tuple[_Place, Record | FeedbackRowError]] = []
        while self.format is None and len(seen) <= _MOST_UNCLEAR and (item := next(records, None)) is not None:
            seen.append(item)
            # A first record that is malformed says nothing about the others.
            if not isinstance(item[1], FeedbackRowError):
                self.format = format_of(item[1], self.options.columns)
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
        if rule is None:
            thumb = self.labels.thumbs_up(candidate.label, row.place)
        else:
            thumb = thumb_by_rule(rule, candidate.ratings, self.options.columns.label, row.place)
        if isinstance(thumb, LeftOut):
            return thumb
        # Four times as fast as dataclasses.replace, and this is done for every row.
        return FeedbackRow(
            row.prompt, row.completion, thumb, row.place, row.tools, row.template_options, row.num_trailing
        )
