"""What labels mean: one closed vocabulary for each source, a map that the user gives, or a rule for ratings."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bco_lightning.batch import LeftOut
from bco_lightning.data.options import Rating
from bco_lightning.data.values import MISSING, shown, value_at
from bco_lightning.errors import FeedbackRowError

NO_FEEDBACK = "no feedback"
BETWEEN = "rating between thumbs-up and thumbs-down"
UNTOUCHED = "rating left at its default"
DROPPED_LABEL = "label mapped to drop"

Vocabulary = dict[tuple[type, Any], bool]


def _word(label: Any) -> Any:
    return type(label), label  # as True == 1 == 1.0 in Python


_PAIRS = ((True, False), (1, 0), (1, -1), ("up", "down"), ("true", "false"), ("👍", "👎"))  # thumbs-up, thumbs-down
_VOCABULARIES: tuple[Vocabulary, ...] = tuple({_word(up): True, _word(down): False} for up, down in _PAIRS)
_CHOICES = 'true/false, 1/0, 1/-1, "up"/"down", "true"/"false" or "👍"/"👎"'


@dataclass
class LabelVocabulary:
    """The one closed vocabulary that a source's labels speak, narrowed down row by row.

    Args:
        thumbs: What each label means instead, as ``data.columns.thumbs`` says.

    Example:
        >>> labels = LabelVocabulary()
        >>> labels.thumbs_up(1, "log.jsonl:1"), labels.thumbs_up(-1, "log.jsonl:2")
        (True, False)
        >>> labels.thumbs_up(0, "log.jsonl:3")
        Traceback (most recent call last):
        ...
        bco_lightning.errors.FeedbackRowError: log.jsonl:3: label 0 mixes two vocabularies; labels so far were 1/-1...
        >>> LabelVocabulary({"4": "up", "2": "down"}).thumbs_up(4, "log.jsonl:1")
        True
        >>> LabelVocabulary({"3": "drop"}).thumbs_up(3, "log.jsonl:1")
        LeftOut(place='log.jsonl:1', reason='label mapped to drop')
    """

    thumbs: Mapping[str, str] | None = None
    candidates: tuple[Vocabulary, ...] = field(default=_VOCABULARIES, init=False)
    seen: list[str] = field(default_factory=list, init=False)

    def thumbs_up(self, label: Any, place: str) -> bool | LeftOut:
        """Reads one label.

        Args:
            label: As it stands in the source.
            place: File and line, for the message.

        Returns:
            Whether it is a thumbs-up, or that the row is left out, as ``thumbs`` says.

        Raises:
            FeedbackRowError: If it is in no vocabulary, or not in the one that earlier rows of the source spoke.
        """
        if self.thumbs is not None:
            return self._mapped(self.thumbs, label, place)
        word = _word(label) if isinstance(label, (bool, int, float, str)) else None
        matching = tuple(vocabulary for vocabulary in self.candidates if word in vocabulary)
        if word is None or not matching:
            raise self._unknown(label, word, place)
        self.candidates = matching
        if shown(label) not in self.seen:
            self.seen.append(shown(label))
        return matching[0][word]

    def _mapped(self, thumbs: Mapping[str, str], label: Any, place: str) -> bool | LeftOut:
        written = json.dumps(label) if label is None or isinstance(label, (bool, int, float)) else label
        if not isinstance(written, str) or written not in thumbs:
            known = ", ".join(shown(word) for word in thumbs)
            raise FeedbackRowError(place, f"label must be one of data.columns.thumbs ({known}), found {shown(label)}.")
        return LeftOut(place, DROPPED_LABEL) if thumbs[written] == "drop" else thumbs[written] == "up"

    def _unknown(self, label: Any, word: Any, place: str) -> FeedbackRowError:
        if any(word in vocabulary for vocabulary in _VOCABULARIES):
            return FeedbackRowError(
                place,
                f"label {shown(label)} mixes two vocabularies; labels so far were {'/'.join(self.seen)}.",
                "Use one vocabulary in the whole source.",
            )
        if isinstance(label, (int, float)) and label == label and label not in (1, 0, -1):
            remedy = (
                "This looks like a rating, which needs a rule: set data.rating, convert the column before, or say "
                """which mean what by data.columns.thumbs: {"1": down, "2": down, "3": drop, "4": up, "5": up}."""
            )
        else:
            remedy = (
                "Use one vocabulary in the whole source, or say what its labels mean, for instance "
                """data.columns.thumbs: {"good": up, "bad": down}."""
            )
        return FeedbackRowError(place, f"label must be one of {_CHOICES}, found {shown(label)}.", remedy)


def thumb_by_rule(rule: Rating, ratings: Mapping[str, Any], column: str, place: str) -> bool | LeftOut:
    """Applies the rule of ratings to a row.

    Args:
        rule: The rule.
        ratings: Every rating of the row, by name.
        column: The one to go by if the rule names none.
        place: File and line.

    Returns:
        Whether it is thumbs-up, or that the row is left out; a rating that is null or an empty cell is no feedback.

    Raises:
        FeedbackRowError: If there is no such rating, or it is no finite number.

    Example:
        >>> rule = Rating("helpfulness", up=4, down=2)
        >>> [thumb_by_rule(rule, {"helpfulness": value}, "label", "log.jsonl:1") for value in (4, 1.5)]
        [True, False]
        >>> thumb_by_rule(rule, {"helpfulness": 3}, "label", "log.jsonl:1")
        LeftOut(place='log.jsonl:1', reason='rating between thumbs-up and thumbs-down')
    """
    if rule.untouched and all(value_at(ratings, name) == value for name, value in rule.untouched.items()):
        return LeftOut(place, UNTOUCHED)
    name = rule.column or column
    value = value_at(ratings, name, MISSING)
    if value is MISSING:
        raise FeedbackRowError(
            place, f"expected a rating {name!r}, found none.", "Name the column by data.rating.column."
        )
    if value is None or (isinstance(value, str) and not value.strip()):
        return LeftOut(place, NO_FEEDBACK)
    # Comparing is exact, where math.isfinite fails on an integer beyond all floats.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise FeedbackRowError(place, f"expected a number as rating {name!r}, found {shown(value)}.")
    up, down = rule.limits
    return LeftOut(place, BETWEEN) if down < value < up else value >= up
