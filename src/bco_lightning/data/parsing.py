"""From the records of one source to rows with thumbs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from bco_lightning.batch import FeedbackRow, LeftOut
from bco_lightning.data.formats import FORMATS, format_of
from bco_lightning.data.formats.record_format import Candidate, Origin, RecordFormat, RowFormat
from bco_lightning.data.labels import LabelVocabulary, thumb_by_rule
from bco_lightning.data.records import Record
from bco_lightning.errors import FeedbackRowError


def rated(row, thumb):
    """Until nothing asks for it."""
    return thumb if isinstance(thumb, LeftOut) else replace(row, thumbs_up=thumb)


Parsed = Candidate | LeftOut | FeedbackRowError


class RecordParser:
    """Makes rows of the records of one source, which have one format and speak one vocabulary.

    Args:
        options: How records become rows; where the format is ``auto``, the first record that looks
            like one of a format decides.
        labelled: Whether rows need a label.
    """

    def __init__(self, options: RowFormat, labelled: bool = True) -> None:
        self.options, self.labelled = options, labelled
        self.labels = LabelVocabulary(thumbs=options.columns.thumbs)
        self.format: RecordFormat | None = FORMATS.get(options.format)

    @property
    def format_name(self) -> str:
        """What the records were taken for; ``auto`` before there was a good one."""
        return next((name for name, known in FORMATS.items() if known is self.format), "auto")

    @property
    def label_column(self) -> str | None:
        """The column whose cells a CSV means as booleans and numbers, if labels are not mapped as they are written."""
        return None if self.options.columns.thumbs else self.options.columns.label

    @property
    def numeric_columns(self) -> frozenset[str]:
        """Columns whose cells a CSV means as numbers: those of the rule of ratings."""
        rating = self.options.rating
        return frozenset({rating.column or self.options.columns.label, *rating.untouched} if rating else ())

    def candidates(self, record: Record, place: str) -> Iterator[Parsed]:
        """The rows of one record; what is malformed comes as an error, and nothing of the record after it."""
        try:
            for item in self._format_of(record).candidates(record, Origin(place, self.options, self.labelled)):
                yield self._by_rule(item)
        except FeedbackRowError as error:
            yield error.without_cause()

    def _format_of(self, record: Record) -> RecordFormat:
        known = self.format or FORMATS[format_of(record, self.options.columns) or "unpaired"]
        # A first record that is malformed says nothing about the others.
        if self.format is None and known.matches(record, self.options.columns):
            self.format = known
        return known

    def _by_rule(self, item: Candidate | LeftOut) -> Parsed:
        """Spares the tokenizer what the rule of ratings leaves out; used rows alone narrow a vocabulary down."""
        if self.options.rating is None or not self.labelled or isinstance(item, LeftOut):
            return item
        try:
            outcome = self.rated(item)
        except FeedbackRowError as error:
            return error.without_cause()
        return outcome if isinstance(outcome, LeftOut) else item

    def rated(self, candidate: Candidate) -> FeedbackRow | LeftOut:
        """The row with its thumb, by the rule of ratings or the source's vocabulary, which is narrowed down by it.

        Raises:
            FeedbackRowError: If the label is unknown, or no number where a rule is given.
        """
        row, rule = candidate.row, self.options.rating
        if not self.labelled or row.thumbs_up is not None:
            return row
        if rule is not None:
            return rated(row, thumb_by_rule(rule, candidate.ratings, self.options.columns.label, row.place))
        return rated(row, self.labels.thumbs_up(candidate.label, row.place))
