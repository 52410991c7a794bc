"""What labels mean: one closed vocabulary for each source, or a map that the user gives."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bco_lightning.batch import LeftOut
from bco_lightning.data.messages import shown
from bco_lightning.errors import FeedbackRowError

DROPPED_LABEL = "label mapped to drop"

# (thumbs-up, thumbs-down). True == 1 in Python, so values are compared together with their type.
_VOCABULARIES: tuple[tuple[Any, Any], ...] = (
    (True, False),
    (1, 0),
    (1, -1),
    ("up", "down"),
    ("true", "false"),
    ("👍", "👎"),
)
_CHOICES = 'true/false, 1/0, 1/-1, "up"/"down", "true"/"false" or "👍"/"👎"'


@dataclass
class LabelVocabulary:
    """The one closed vocabulary that a source's labels speak, narrowed down row by row.

    Example:
        >>> labels = LabelVocabulary()
        >>> labels.thumbs_up(1, "log.jsonl:1"), labels.thumbs_up(-1, "log.jsonl:2")
        (True, False)
        >>> labels.thumbs_up(0, "log.jsonl:3")
        Traceback (most recent call last):
        ...
        bco_lightning.errors.FeedbackRowError: log.jsonl:3: label 0 mixes two vocabularies; labels so far were 1/-1...
        >>> LabelVocabulary(thumbs={"4": "up", "2": "down"}).thumbs_up(4, "log.jsonl:1")
        True
        >>> LabelVocabulary(thumbs={"3": "drop"}).thumbs_up(3, "log.jsonl:1")
        LeftOut(place='log.jsonl:1', reason='label mapped to drop')
    """

    candidates: tuple[tuple[Any, Any], ...] = _VOCABULARIES
    seen: list[str] = field(default_factory=list)
    thumbs: Mapping[str, str] | None = None
    _known: dict[tuple[type, Any], bool] = field(default_factory=dict, init=False, repr=False)

    def thumbs_up(self, value: Any, place: str) -> bool | LeftOut:
        """Reads one label.

        Args:
            value: The label as it stands in the source.
            place: File and line, for the message.

        Returns:
            Whether it is a thumbs-up, or that the row is left out, as ``thumbs`` says.

        Raises:
            FeedbackRowError: If it is in no vocabulary, or not in the one that earlier rows of the source spoke.
        """
        if self.thumbs is not None:
            return self._mapped(self.thumbs, value, place)
        word = (type(value), value) if isinstance(value, (bool, int, str)) else None
        # What was understood once lies in every vocabulary that is left.
        if word is None or word not in self._known:
            meaning = self._understood(value, place)
            self._known[type(value), value] = meaning
            return meaning
        return self._known[word]

    def _understood(self, value: Any, place: str) -> bool:
        matching = tuple(pair for pair in self.candidates if any(_same(value, word) for word in pair))
        if not matching:
            raise self._unknown(value, place)
        self.candidates = matching
        if shown(value) not in self.seen:
            self.seen.append(shown(value))
        return any(_same(value, pair[0]) for pair in matching)

    def _mapped(self, thumbs: Mapping[str, str], value: Any, place: str) -> bool | LeftOut:
        written = json.dumps(value) if value is None or isinstance(value, (bool, int, float)) else value
        if not isinstance(written, str) or written not in thumbs:
            known = ", ".join(shown(label) for label in thumbs)
            raise FeedbackRowError(place, f"label must be one of data.columns.thumbs ({known}), found {shown(value)}.")
        return LeftOut(place, DROPPED_LABEL) if thumbs[written] == "drop" else thumbs[written] == "up"

    def _unknown(self, value: Any, place: str) -> FeedbackRowError:
        if any(_same(value, word) for pair in _VOCABULARIES for word in pair):
            return FeedbackRowError(
                place,
                f"label {shown(value)} mixes two vocabularies; labels so far were {'/'.join(self.seen)}.",
                "Use one vocabulary in the whole source.",
            )
        if isinstance(value, (int, float)) and value == value and value not in (1, 0, -1):
            remedy = (
                "This looks like a rating, which needs a rule: set data.rating, convert the column before, or say "
                """which mean what by data.columns.thumbs: {"1": down, "2": down, "3": drop, "4": up, "5": up}."""
            )
        else:
            remedy = (
                "Use one vocabulary in the whole source, or say what its labels mean, for instance "
                """data.columns.thumbs: {"good": up, "bad": down}."""
            )
        return FeedbackRowError(place, f"label must be one of {_CHOICES}, found {shown(value)}.", remedy)


def _same(value: Any, word: Any) -> bool:
    return type(value) is type(word) and bool(value == word)
