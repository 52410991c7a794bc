"""Turn one record of a feedback log into a :class:`FeedbackRow`, or say which line is wrong and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bco_lightning.batch import FeedbackRow, Message
from bco_lightning.errors import FeedbackRowError

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
_ROLES = ("system", "user", "assistant", "tool")
_MISSING = object()


@dataclass
class Columns:
    """Names of the three columns of a feedback log.

    Args:
        prompt: Text, or a list of chat messages.
        completion: Text, or a list of chat messages.
        label: The thumb.
    """

    prompt: str = "prompt"
    completion: str = "completion"
    label: str = "label"


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
    """

    candidates: tuple[tuple[Any, Any], ...] = _VOCABULARIES
    seen: list[str] = field(default_factory=list)

    def thumbs_up(self, value: Any, place: str) -> bool:
        """Reads one label.

        Args:
            value: The label as it stands in the source.
            place: File and line, for the message.

        Returns:
            Whether it is a thumbs-up.

        Raises:
            FeedbackRowError: If it is in no vocabulary, or not in the one that earlier rows of the source spoke.
        """
        matching = tuple(pair for pair in self.candidates if any(_same(value, word) for word in pair))
        if not matching:
            known = any(_same(value, word) for pair in _VOCABULARIES for word in pair)
            problem = (
                f"label {_shown(value)} mixes two vocabularies; labels so far were {'/'.join(self.seen)}."
                if known
                else f"label must be one of {_CHOICES}, found {_shown(value)}."
            )
            raise FeedbackRowError(place, problem, "Use one vocabulary in the whole source.")
        self.candidates = matching
        if _shown(value) not in self.seen:
            self.seen.append(_shown(value))
        return any(_same(value, pair[0]) for pair in matching)


def parse_row(record: Mapping[str, Any], place: str, columns: Columns, labels: LabelVocabulary | None) -> FeedbackRow:
    """Validates one record.

    Args:
        record: A line of the log.
        place: File and line, for messages.
        columns: Names of the columns.
        labels: The source's label vocabulary; ``None`` when labels are not needed (prediction).

    Returns:
        The row with prompt and completion as messages.

    Raises:
        FeedbackRowError: If a column is missing, empty or of the wrong type, or the label is unknown.
    """
    prompt = _messages(record, columns.prompt, place, role="user")
    completion = _messages(record, columns.completion, place, role="assistant")
    if completion[0]["role"] != "assistant" or completion[-1]["role"] != "assistant":
        raise FeedbackRowError(
            place,
            f"{columns.completion!r} must begin and end with an assistant message, found roles "
            f"{[message['role'] for message in completion]}.",
        )
    if labels is None:
        return FeedbackRow(prompt, completion, None, place)
    return FeedbackRow(prompt, completion, labels.thumbs_up(_column(record, columns.label, place), place), place)


def _messages(record: Mapping[str, Any], column: str, place: str, role: str) -> list[Message]:
    value = _column(record, column, place)
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise FeedbackRowError(place, f"{column!r} must be text or a list of chat messages, found {_type_name(value)}.")
    for number, message in enumerate(value, 1):
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(message, Mapping) or not isinstance(content, str) or message.get("role") not in _ROLES:
            raise FeedbackRowError(
                place,
                f"message {number} of {column!r} must have a text 'content' and a 'role' out of {', '.join(_ROLES)}.",
            )
        if not content.strip():
            raise FeedbackRowError(
                place, f"{column!r} must hold text, found nothing but white space.", "Remove or complete the row."
            )
    return [dict(message) for message in value]


def _column(record: Mapping[str, Any], column: str, place: str) -> Any:
    value = record.get(column, _MISSING)
    if value is _MISSING:
        raise FeedbackRowError(
            place,
            f"expected a column {column!r}, found {', '.join(map(repr, record)) or 'none'}.",
            "Rename the column, or set data.columns.",
        )
    return value


def _same(value: Any, word: Any) -> bool:
    return type(value) is type(word) and bool(value == word)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    text = repr(value) if not isinstance(value, str) else f'"{value}"'
    return text if len(text) <= 24 else f"{text[:20]}… ({_type_name(value)})"


def _type_name(value: Any) -> str:
    return (
        "nothing (null)" if value is None else f"a value of type {type(value).__name__}" if value else "an empty list"
    )
