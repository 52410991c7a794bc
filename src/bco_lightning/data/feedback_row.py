"""Turn one record of a feedback log into a :class:`FeedbackRow`, or say which line is wrong and why."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from bco_lightning.batch import FeedbackRow, Message
from bco_lightning.errors import ConfigError, FeedbackRowError

# Limits of a row, so that a single one cannot stall the start: about 250,000 tokens of English, and some 0.2 seconds of
# chat template, which is rendered once for each message of a completion.
MAX_ROW_CHARACTERS = 1_000_000
MAX_ROW_MESSAGES = 500
MAX_MESSAGE_DEPTH = 32

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
    """Names of the three columns of a feedback log, and what its labels mean.

    Args:
        prompt: Text, or a list of chat messages.
        completion: Text, or a list of chat messages.
        label: The thumb.
        thumbs: What each label means, where a log speaks a vocabulary of its own: ``{"good": up, "bad": down}``, or
            for a rating ``{"1": down, "2": down, "4": up, "5": up}``. Any other label is then an error.
    """

    prompt: str = "prompt"
    completion: str = "completion"
    label: str = "label"
    thumbs: dict[str, Literal["up", "down"]] | None = None

    def __post_init__(self) -> None:
        for label, thumb in (self.thumbs or {}).items():
            if thumb not in ("up", "down"):
                raise ConfigError("data.columns.thumbs", f"expected up or down for {label!r}, found {thumb!r}.")


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
    """

    candidates: tuple[tuple[Any, Any], ...] = _VOCABULARIES
    seen: list[str] = field(default_factory=list)
    thumbs: Mapping[str, str] | None = None

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
        if self.thumbs is not None:
            return self._mapped(self.thumbs, value, place)
        matching = tuple(pair for pair in self.candidates if any(_same(value, word) for word in pair))
        if not matching:
            raise self._unknown(value, place)
        self.candidates = matching
        if shown(value) not in self.seen:
            self.seen.append(shown(value))
        return any(_same(value, pair[0]) for pair in matching)

    def _mapped(self, thumbs: Mapping[str, str], value: Any, place: str) -> bool:
        written = json.dumps(value) if value is None or isinstance(value, (bool, int, float)) else value
        if not isinstance(written, str) or written not in thumbs:
            known = ", ".join(shown(label) for label in thumbs)
            raise FeedbackRowError(place, f"label must be one of data.columns.thumbs ({known}), found {shown(value)}.")
        return thumbs[written] == "up"

    def _unknown(self, value: Any, place: str) -> FeedbackRowError:
        if any(_same(value, word) for pair in _VOCABULARIES for word in pair):
            return FeedbackRowError(
                place,
                f"label {shown(value)} mixes two vocabularies; labels so far were {'/'.join(self.seen)}.",
                "Use one vocabulary in the whole source.",
            )
        if isinstance(value, (int, float)) and value == value and value not in (1, 0, -1):
            remedy = (
                "This looks like a rating, which needs a rule: convert the column before, or say which values mean "
                """what, for instance data.columns.thumbs: {"1": down, "2": down, "4": up, "5": up}."""
            )
        else:
            remedy = (
                "Use one vocabulary in the whole source, or say what its labels mean, for instance "
                """data.columns.thumbs: {"good": up, "bad": down}."""
            )
        return FeedbackRowError(place, f"label must be one of {_CHOICES}, found {shown(value)}.", remedy)


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
        FeedbackRowError: If a column is missing, empty, of the wrong type or over a limit, or the label is unknown.
    """
    prompt = _messages(record, columns.prompt, place, role="user")
    completion = _messages(record, columns.completion, place, role="assistant")
    if completion[0]["role"] != "assistant" or completion[-1]["role"] != "assistant":
        raise FeedbackRowError(
            place,
            f"{columns.completion!r} must begin and end with an assistant message, found {len(completion)} messages, "
            f"the first by {completion[0]['role']}, the last by {completion[-1]['role']}.",
        )
    _check_size(prompt + completion, place)
    row = FeedbackRow(prompt, completion, None, place)
    return row if labels is None else rated(row, label_of(record, place, columns), labels)


def label_of(record: Mapping[str, Any], place: str, columns: Columns) -> Any:
    """The label as it stands in the record.

    Raises:
        FeedbackRowError: If there is no such column.
    """
    return _column(record, columns.label, place)


def rated(row: FeedbackRow, label: Any, labels: LabelVocabulary) -> FeedbackRow:
    """The row with its thumb, read by the source's vocabulary, which is narrowed down by it.

    Raises:
        FeedbackRowError: If the label is unknown.
    """
    return replace(row, thumbs_up=labels.thumbs_up(label, row.place))


def shown(value: Any) -> str:
    """A value for a message: itself if it is short and label-like, else its kind and size, as it may be private.

    Example:
        >>> shown("up"), shown(3.5), shown(None), shown("I was born in Bremen."), shown([True])
        ('"up"', '3.5', 'null', 'a text of 21 characters', 'a list of 1')
    """
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    if isinstance(value, str):
        label_like = len(value) <= 12 and len(value.split()) <= 1 and "@" not in value and value.isprintable()
        return f'"{value}"' if label_like else f"a text of {len(value)} characters"
    if isinstance(value, (int, float)):
        # Longer numbers may be those of telephones and accounts.
        return repr(value) if (-1000 < value < 1000 and len(repr(value)) <= 12) or value != value else "another number"
    if isinstance(value, (list, dict)):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    return f"a value of type {type(value).__name__}"


def texts_in(value: Any, depth: int = 0) -> Iterator[str]:
    """Every text in messages or a part of one, keys included.

    Raises:
        ValueError: If lists and objects are nested too deeply.
    """
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        if depth >= MAX_MESSAGE_DEPTH:
            raise ValueError(f"at most {MAX_MESSAGE_DEPTH} levels of nesting in a message, found more")
        if isinstance(value, dict):
            yield from value.keys()
            value = value.values()
        for part in value:
            if isinstance(part, str):
                yield part
            else:
                yield from texts_in(part, depth + 1)


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


def _check_size(messages: list[Message], place: str) -> None:
    if len(messages) > MAX_ROW_MESSAGES:
        raise FeedbackRowError(
            place, f"expected at most {MAX_ROW_MESSAGES} messages in a row, found {len(messages)}.", "Shorten the row."
        )
    characters = 0
    try:
        for text in texts_in(messages):
            characters += len(text)
            text.encode()
            if "\x00" in text:
                raise FeedbackRowError(
                    place, "expected text, found a NUL character.", "Remove the row or the character."
                )
    except UnicodeEncodeError as error:
        raise FeedbackRowError(place, "expected Unicode text, found half of a surrogate pair.") from error
    except FeedbackRowError:
        raise
    except ValueError as error:
        raise FeedbackRowError(place, f"expected {error}.") from error
    if characters > MAX_ROW_CHARACTERS:
        raise FeedbackRowError(
            place,
            f"expected at most {MAX_ROW_CHARACTERS:,} characters in a row, found {characters:,}.",
            "Shorten or remove the row.",
        )


def _column(record: Mapping[str, Any], column: str, place: str) -> Any:
    value = record.get(column, _MISSING)
    if value is _MISSING:
        raise FeedbackRowError(
            place,
            f"expected a column {column!r}, found {_keys_of(record)}.",
            "Rename the column, or set data.columns.",
        )
    return value


def _keys_of(record: Mapping[str, Any]) -> str:
    # A name of a column is an identifier; what is none may be a text that stands in the wrong place.
    keys = [repr(key) if str(key).isidentifier() and len(str(key)) <= 32 else shown(key) for key in record]
    return ", ".join(keys[:10]) + (f" and {len(keys) - 10} more" if len(keys) > 10 else "") or "none"


def _same(value: Any, word: Any) -> bool:
    return type(value) is type(word) and bool(value == word)


def _type_name(value: Any) -> str:
    return (
        "nothing (null)" if value is None else f"a value of type {type(value).__name__}" if value else "an empty list"
    )
