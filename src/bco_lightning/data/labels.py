"""What labels mean: one closed vocabulary for each source, a map that the user gives, or a rule for ratings."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from bco_lightning.batch import LeftOut
from bco_lightning.data.options import Rating
from bco_lightning.data.records.csv_rows import number_in
from bco_lightning.data.values import Record, is_blank, plain_number, shown, value_at
from bco_lightning.errors import FeedbackRowError

NO_FEEDBACK = "no feedback"
BETWEEN = "rating between thumbs-up and thumbs-down"
UNTOUCHED = "rating left at its default"
DROPPED_LABEL = "label mapped to drop"


def _word(label: Any) -> Any:
    return type(label), label  # as True == 1 == 1.0 in Python


_PAIRS = ((True, False), (1, 0), (1, -1), ("up", "down"), ("true", "false"),  # thumbs-up, thumbs-down
          ("True", "False"), ("TRUE", "FALSE"), ("👍", "👎"),
          ("GOOD", "BAD"), ("thumbsUp", "thumbsDown"))  # of AnythingLLM, of LibreChat  # fmt: skip
_VOCABULARIES = [{_word(up): True, _word(down): False} for up, down in _PAIRS]
_VOCABULARY = (
    "Use one vocabulary in the whole source, or say what its labels mean, for instance "
    """data.columns.thumbs: {"good": up, "bad": down}."""
)
_POINT = "Write numbers with a decimal point: 4.5, not 4,5."
_CHOICES = 'true/false, 1/0, 1/-1, "up"/"down", "true"/"false", "True"/"False" or "👍"/"👎"'


def rule_for(number: float, column: str = "") -> str:
    """An example of a rule, by one of the ratings."""
    down = round(number - (1 if abs(number) >= 1 else 0.1), 6)
    named = f"column: {column}, " if column else ""
    return f"for instance {{{named}up: {number:g}, down: {down:g}}} if {number:g} is good"


def _has_decimal_comma(value: Any) -> bool:
    return isinstance(value, str) and value.count(",") == 1 and isinstance(number_in(value.replace(",", ".")), float)


class LabelVocabulary:
    """The one closed vocabulary that a source's labels speak, narrowed down row by row.

    Args:
        thumbs: What each label means instead, as ``data.columns.thumbs`` says.
    """

    def __init__(self, thumbs: Mapping[str, str] | None = None) -> None:
        self.thumbs, self.candidates = thumbs, _VOCABULARIES
        self.seen: dict[Any, str] = {}

    def thumbs_up(self, label: Any, place: str) -> bool | LeftOut:
        """Whether a label is a thumbs-up, or that its row is left out; an error if the source cannot say such a one."""
        if self.thumbs is not None:
            return self._mapped(self.thumbs, label, place)
        if is_blank(label):
            return LeftOut(place, NO_FEEDBACK)
        label = plain_number(label)
        word = _word(label) if isinstance(label, (bool, int, float, str)) else None
        matching = [vocabulary for vocabulary in self.candidates if word in vocabulary]
        if not matching:
            raise self._unknown(label, word, place)
        self.candidates = matching
        if word not in self.seen:
            self.seen[word] = shown(label)
        return matching[0][word]

    def _mapped(self, thumbs: Mapping[str, str], label: Any, place: str) -> bool | LeftOut:
        for word in (label, plain_number(label)):
            written = json.dumps(word) if word is None or isinstance(word, (bool, int, float)) else word
            if isinstance(written, str) and written in thumbs:
                return LeftOut(place, DROPPED_LABEL) if thumbs[written] == "drop" else thumbs[written] == "up"
        if is_blank(label):
            return LeftOut(place, NO_FEEDBACK)
        known = ", ".join(shown(word) for word in thumbs)
        problem = f"label must be one of data.columns.thumbs ({known}), found {shown(label)}."
        raise FeedbackRowError(place, problem, "It takes the place of the usual words: name all that the log has.")

    def _unknown(self, label: Any, word: Any, place: str) -> FeedbackRowError:
        if any(word in vocabulary for vocabulary in _VOCABULARIES):
            problem = f"label {shown(label)} mixes two vocabularies; labels so far were {'/'.join(self.seen.values())}."
            return FeedbackRowError(place, problem, _VOCABULARY)
        remedy = _POINT if _has_decimal_comma(label) else _VOCABULARY
        number = number_in(label) if isinstance(label, str) else label
        if isinstance(number, (int, float)) and number == number and number not in (1, 0, -1):
            remedy = (
                f"This looks like a rating, which needs a rule: set data.rating, {rule_for(number)}, convert the "
                "column before, or say which mean what by data.columns.thumbs: "
                """{"1": down, "2": down, "3": drop, "4": up, "5": up}."""
            )
        return FeedbackRowError(place, f"label must be one of {_CHOICES}, found {shown(label)}.", remedy)


def thumb_by_rule(rule: Rating, ratings: Record, column: str, place: str) -> bool | LeftOut:
    """Whether the rule calls a row thumbs-up, or that it is left out; none, null or an empty cell is no feedback.

    Of all ratings of the row, it goes by the one that the rule names, else by ``column``.
    """
    if rule.untouched and all(value_at(ratings, name) == value for name, value in rule.untouched.items()):
        return LeftOut(place, UNTOUCHED)
    name = rule.column or column
    value = value_at(ratings, name)
    if is_blank(value):
        return LeftOut(place, NO_FEEDBACK)
    # Comparing is exact, where math.isfinite fails on an integer beyond all floats.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        remedy = _POINT if _has_decimal_comma(value) else ""
        raise FeedbackRowError(place, f"expected a number as rating {name!r}, found {shown(value)}.", remedy)
    up, down = rule.limits
    if min(up, down) < value < max(up, down):
        return LeftOut(place, BETWEEN)
    return value <= up if up < down else value >= up  # of ranks, 1 is best
