"""What tools keep of a call, what came of it and how it was rated; and which of its named scores is the thumb.

What was said is understood in the layouts of :mod:`~.traces`; scores may also stand in a file of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

from bco_lightning.batch import FeedbackRow, LeftOut
from bco_lightning.data.formats.record_format import Candidate, Origin, Rows
from bco_lightning.data.formats.traces import traced_row
from bco_lightning.data.formats.unpaired import unrated_row
from bco_lightning.data.labels import NO_FEEDBACK
from bco_lightning.data.options import Columns
from bco_lightning.data.values import MISSING, Record, from_json_text, is_blank, keys_of, plain_number, value_at

FAILED = "call that failed"
MIXED = "mean of several users' feedback"
MAX_RATINGS = 10_000
# What the documentation of Langfuse and LangSmith call the score of a user's thumb.
USUAL_NAMES = (Columns().label, "user-feedback", "user_feedback", "user-score", "user_score")


class Score(NamedTuple):
    """One rating of a call."""

    name: Any
    value: Any  # ``None`` where one could have been given, and was not
    user: Any = None  # who gave it, where that is known
    is_mean: bool = False  # of different ratings, so only a rule can say what it means


Call = tuple[Any, ...] | Record  # what went in, what came out and perhaps tools; or all in columns


@dataclass(frozen=True)
class RatedCalls:
    """Records of one tool, where a name with dots reaches into objects."""

    # A record has all names of one group; one that begins with a dot is how some name ends.
    marks: tuple[tuple[str, ...], ...]
    call: Callable[[Record], Call | str]  # a text is the reason for which there is none
    scores: Callable[[Record], Iterable[Score]] = lambda _: ()
    # The key by which scores in another file name a record, and what one of these says.
    beside: tuple[str, Callable[[Record], Iterable[Score]]] | None = None
    failed: Callable[[Record], Any] = lambda _: False
    usual: tuple[str, ...] = ()  # names of the score that is a user's thumb, beside those of all tools
    only: tuple[str, ...] = ()  # what such a score says, unless options say what its words mean; any other is no thumb
    json: tuple[str, ...] = ()  # names of what must be JSON where it is a text
    required: str = ""  # the name of what each rated call has to have

    def matches(self, record: Record, columns: Columns) -> bool:
        """Whether a record has all names of one group."""
        return any(all(_has(record, name) for name in group) for group in self.marks)

    def candidates(self, record: Record, origin: Origin) -> Rows:
        """The rows of one call: one for each time that the chosen score was given.

        The row is only made if there is feedback, as traces hold much that is no conversation.
        """
        texts = {name: record[name] for name in self.json if not is_blank(record.get(name))}
        record = record | {name: from_json_text(text, name, origin.place) for name, text in texts.items()}
        scores, chosen = self._scores(record, origin), ""
        with origin.label_is_optional():
            chosen = self._chosen(scores, origin)
        given = scores.get(chosen, [])
        given = given if origin.labelled else given[-1:] or [Score(chosen, None)]
        if not given:
            yield origin.left_out(NO_FEEDBACK)
            return
        row = self._row(record, origin)
        of_user: dict[str, Record] = {}
        for score in chain(*scores.values()):
            of_user.setdefault(str(score.user), {})[score.name] = score.value
        for number, score in enumerate(given):
            if isinstance(row, LeftOut):
                yield row
                continue
            if score.is_mean and origin.options.rating is None:
                yield origin.left_out(MIXED)
                continue
            if score.user is None:
                ratings = {name: of[min(number, len(of) - 1)].value for name, of in scores.items() if of}
            else:
                ratings = of_user[str(score.user)] | {chosen: score.value}
            label = plain_number(score.value)
            yield Candidate(row, {**ratings, origin.columns.label: label})

    def _scores(self, record: Record, origin: Origin) -> dict[str, list[Score]]:
        """All scores by their name; an empty list of one that could have been given."""
        given = self.scores(record)
        for key, read in [self.beside] if self.beside else ():
            given = chain(given, *map(read, origin.options.feedback.on(value_at(record, key))))
        scores: dict[str, list[Score]] = {}
        for number, score in enumerate(given):
            if number >= MAX_RATINGS:
                raise origin.error(f"expected at most {MAX_RATINGS:,} ratings of one run, found more.")
            name, value = score.name, score.value
            no_thumb = self.only and name in self.usual and value not in self.only and not origin.columns.thumbs
            if isinstance(name, str) and not no_thumb:
                scores.setdefault(name, []).extend([] if value is None else [score])
        return scores

    def _chosen(self, scores: Mapping[str, list[Score]], origin: Origin) -> str:
        """The score of the rule of ratings, else that of ``columns.label``, else the first of the usual names."""
        label, rating = origin.columns.label, origin.options.rating
        if rating is not None and rating.column is not None:
            return rating.column
        given = sorted(name for name, of in scores.items() if of)
        if label != Columns().label or not given:
            return label
        usual = next((name for name in (*USUAL_NAMES, *self.usual) if name in scores), None)
        if usual is None:
            expected = f"expected a score {(*self.usual, USUAL_NAMES[1])[0]!r}, found {keys_of(given)}."
            raise origin.error(expected, "Name the score by data.columns.label.")
        return usual

    def _row(self, record: Record, origin: Origin) -> FeedbackRow | LeftOut:
        if self.failed(record):
            return origin.left_out(FAILED)
        if self.required:
            origin.required(record, self.required)
        call = self.call(record)
        if isinstance(call, str):
            return origin.left_out(call)
        return traced_row(origin, *call) if isinstance(call, tuple) else unrated_row(call, origin)


def _has(record: Record, name: str) -> bool:
    ending = name.startswith(".")
    return any(key.endswith(name) for key in record) if ending else value_at(record, name, MISSING) is not MISSING
