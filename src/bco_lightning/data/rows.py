"""From records to rated rows: the one way that tables and streams take."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

from bco_lightning.batch import FeedbackRow, LeftOut
from bco_lightning.data.formats import FORMATS, format_of
from bco_lightning.data.formats.record_format import Candidate, Origin, RowFormat, system_column
from bco_lightning.data.images import ImageFinder
from bco_lightning.data.labels import NO_FEEDBACK, LabelVocabulary, rule_for, thumb_by_rule
from bco_lightning.data.records.csv_rows import Cells, number_in, thumb_in
from bco_lightning.data.values import MISSING, Record, column_of, keys_of, value_at
from bco_lightning.errors import FeedbackRowError

RatedRow = FeedbackRow | LeftOut | FeedbackRowError
# Records without the marks of any format that may come before the first with some.
_MOST_UNCLEAR = 100
_MOST_NAMES = 1000
_LARGEST_RATING = 100  # other numbers are ids and times
_Records = Iterator[tuple[Any, Record | FeedbackRowError]]  # each with its place


class RowMaker:
    """Makes rated rows of the records of one source, which have one format and speak one vocabulary.

    It pickles with what it has learned: the ``format``, ``None`` before that where it is ``auto``, and the vocabulary.

    Args:
        options: How records become rows.
        labelled: Whether rows need a label; without, what cannot be read as a thumb is none.
    """

    def __init__(self, options: RowFormat, labelled: bool = True) -> None:
        self.options, self.labelled = options, labelled
        self.format: str | None = options.format if options.format in FORMATS else None
        self.labels = LabelVocabulary(options.columns.thumbs)
        self.systems: list[str] = []  # columns that hold system prompts
        self.unused: list[str] = []  # columns that hold something which no row is made of
        self._settled: set[str] = set()  # these, and those that are used
        self._unrated: Candidate | None = None  # the first row without the column that rates it
        self._found_rating = False

    @property
    def cells(self) -> Cells:
        """What the cells of a CSV mean, by column: thumbs, unless labels are mapped as they stand, and ratings."""
        columns, rule = self.options.columns, self.options.rating
        rated = (rule.column or columns.label, *rule.untouched) if rule else ()
        return {**({} if columns.thumbs else {columns.label: thumb_in}), **dict.fromkeys(rated, number_in)}

    def learn(self, records: _Records) -> _Records:
        """Finds out the format, where it is ``auto``, by the first record that tells; gives all records.

        One that is malformed, empty or a row without any rating may be of another format, too.
        """
        seen: list[tuple[Any, Record | FeedbackRowError]] = []
        while self.format is None and len(seen) <= _MOST_UNCLEAR and (item := next(records, None)) is not None:
            seen.append(item)
            if not isinstance(item[1], FeedbackRowError):
                found = format_of(item[1], self.options.columns)
                rated = value_at(item[1], self._rating) is not None
                self.format = found if found != "unpaired" or rated else None
        self.format = self.format or "unpaired"
        return chain(seen, records)

    @property
    def _rating(self) -> str:
        rule = self.options.rating
        return (rule and rule.column) or self.options.columns.label

    def check_rated(self) -> None:
        """Raises a FeedbackRowError if no row had the column that rates it; some may."""
        if self.labelled and self._unrated is not None and not self._found_rating:
            kind, ratings = "rating" if self.options.rating else "column", self._unrated.ratings
            found = f"expected a {kind} {self._rating!r}, found {keys_of(ratings)}."
            remedy = "Name the column by data.rating.column, or by data.columns.label where there is no rule."
            for name, value in () if self.options.rating else ratings.items():
                number = number_in(value.replace(",", ".")) if isinstance(value, str) else value
                if isinstance(number, (int, float)) and not isinstance(number, bool) and abs(number) <= _LARGEST_RATING:
                    remedy += f" If {name!r} is a rating, set data.rating, {rule_for(number, name)}."
                    break
            raise FeedbackRowError(self._unrated.row.place, found, remedy)

    def rows(self, record: Record, place: str, images: ImageFinder | None = None) -> list[RatedRow]:
        """The rows of one record, each with its thumb; what is malformed comes as an error, and nothing after it."""
        rows: list[RatedRow] = []
        origin = Origin(place, self.options, self.labelled, images or ImageFinder())
        if len(self._settled) < _MOST_NAMES and not self._settled.issuperset(record):
            self._settle(record)
        try:
            for item in FORMATS[self.format or "unpaired"].candidates(record, origin):
                rows.append(self._rated(item, origin) if isinstance(item, Candidate) else item)
        except FeedbackRowError as error:
            rows.append(error.without_cause())
        return rows

    def _settle(self, record: Record) -> None:
        """Finds out which columns of a record no row is made of, in the formats that are not of one tool's export."""
        new = [name for name in record if name not in self._settled and record[name] not in (None, "", [], {})]
        self._settled.update(new)
        layout = FORMATS[self.format or "unpaired"]
        if new and hasattr(layout, "used"):
            columns, rule = self.options.columns, self.options.rating
            used = [*layout.used(record, columns), *([self._rating] if self.format == "unpaired" else [])]
            used += [columns.tools, columns.template_options, columns.images, system := system_column(record, columns)]
            self.systems += [system] if system in new else []
            used += [*(rule.untouched if rule else ()), *([columns.history] if columns.history else [])]
            known = {column_of(record, name) for name in used}
            self.unused += [name for name in new if name not in known]

    def _rated(self, candidate: Candidate, origin: Origin) -> FeedbackRow | LeftOut:
        row, rule = candidate.row, self.options.rating
        if row.thumbs_up is not None:
            return row
        thumb: bool | LeftOut | None = None
        with origin.label_is_optional():
            thumb = self._thumb(candidate)
        if isinstance(thumb, LeftOut):
            if self.labelled:
                return thumb
            thumb = None
        score = None if rule is None or thumb is None else rule.score(value_at(candidate.ratings, self._rating))
        # Four times as fast as dataclasses.replace, and this is done for every row.
        return FeedbackRow(
            row.prompt, row.completion, thumb, row.place, row.tools, row.template_options, row.num_trailing, score
        )

    def _thumb(self, candidate: Candidate) -> bool | LeftOut:
        row, rule = candidate.row, self.options.rating
        label = value_at(candidate.ratings, self._rating, MISSING)
        if label is MISSING:  # who rates some of all answers may leave it out
            self._unrated = self._unrated or candidate
            return LeftOut(row.place, NO_FEEDBACK)
        self._found_rating = True
        if rule is None:
            return self.labels.thumbs_up(label, row.place)
        return thumb_by_rule(rule, candidate.ratings, self.options.columns.label, row.place)
