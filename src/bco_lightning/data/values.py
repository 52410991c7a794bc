"""Values of records: found under their names, cleaned, and shown in messages without what users wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from bco_lightning.errors import FeedbackRowError

Record = dict[str, Any]

MAX_DEPTH = 32
MISSING = object()
_STEP = re.compile(r"\[(-?\d{1,9})\]|[^.\[]+")  # in a name: the place in a list, or the name in an object


def shown(value: Any) -> str:
    """A value for a message: itself if it is short and label-like, else its kind and size, as it may be private.

    Example:
        >>> shown("up"), shown(3.5), shown(None), shown("I was born in Bremen."), shown([True])
        ('"up"', '3.5', 'null', 'a text of 21 characters', 'a list of 1')
    """
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        label_like = len(value) <= 12 and len(value.split()) <= 1 and "@" not in value and value.isprintable()
        return f'"{value}"' if label_like else f"a text of {len(value)} characters"
    if isinstance(value, (int, float)):
        # Longer numbers may be those of telephones and accounts.
        return repr(value) if (-1000 < value < 1000 and len(repr(value)) <= 12) or value != value else "another number"
    if isinstance(value, (list, dict)):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    return f"a value of type {type(value).__name__}"


def keys_of(record: Iterable[str]) -> str:
    """The names of a record's columns, or other keys of it, for a message."""
    # A name of a column is an identifier; what is none may be a text that stands in the wrong place.
    keys = [repr(key) if str(key).isidentifier() and len(str(key)) <= 32 else shown(key) for key in record]
    return ", ".join(keys[:10]) + (f" and {len(keys) - 10} more" if len(keys) > 10 else "") or "none"


def value_at(record: Record, name: str, default: Any = None) -> Any:
    """What a record holds under a name, which may reach into objects, lists, and JSON text of these.

    Example:
        >>> value_at({"feedback": {"score": 1}}, "feedback.score"), value_at({"a.b": 2}, "a.b"), value_at({}, "a.b")
        (1, 2, None)
        >>> value_at({"out": '{"choices": [{"text": "Hi"}]}'}, "out.choices[0].text")
        'Hi'
    """
    if name in record:
        return record[name]
    return _inside(record, name, default) if "." in name or "[" in name else default


def _inside(value: Any, name: str, default: Any) -> Any:
    value = unpacked(value)
    if isinstance(value, dict) and name in value:
        return value[name]
    step = _STEP.match(name)
    if step is None or isinstance(value, str):
        return default
    try:
        inner = value[step[0] if step[1] is None else int(step[1])]
    except (LookupError, TypeError):
        return default
    rest = name[step.end() :].removeprefix(".")
    return _inside(inner, rest, default) if rest else inner


def column_of(record: Record, name: str) -> str:
    """The column of a record in which a name begins."""
    step = None if name in record else _STEP.match(name)
    return step[0] if step else name


def objects_in(value: Any) -> list[Record]:
    """The objects in a list; none in anything else."""
    return [part for part in value if isinstance(part, dict)] if isinstance(value, list) else []


def plain_number(value: Any) -> Any:
    """A whole number as an integer: thumbs that went through a column of floating-point numbers are 1.0 and 0.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def is_blank(value: Any) -> bool:
    """Whether nothing was given: null, or a text without any."""
    return value is None or (isinstance(value, str) and not value.strip())


def without_nulls(value: Any, depth: int = 0) -> Any:
    """The same value without the keys that have none; what is nested too deeply for a message is left as it is."""
    if depth > MAX_DEPTH:
        return value
    if isinstance(value, dict):
        return {key: without_nulls(part, depth + 1) for key, part in value.items() if part is not None}
    return [without_nulls(part, depth + 1) for part in value] if isinstance(value, list) else value


def from_json_text(value: Any, name: str, place: str) -> Any:
    """What a text says in JSON, for columns of files that know no other types; anything but text as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        found = f"{name!r} must hold JSON, found {shown(value)} that is none."
        raise FeedbackRowError(place, found, "Correct or remove the row.") from None


def parsed(value: Any) -> Any:
    """What a text says in JSON; a text that is none, and anything else, is itself."""
    with suppress(ValueError, RecursionError):
        return json.loads(value) if isinstance(value, str) else value
    return value


def unpacked(value: Any) -> Any:
    """Objects and lists that were written as JSON text; any other text is itself."""
    return parsed(value) if isinstance(value, str) and value.startswith(("{", "[")) else value


def add_texts(value: Any, texts: list[str], depth: int) -> None:
    """Appends every text in a message or a part of one, keys included; a ValueError for what is nested too deeply."""
    if isinstance(value, str):
        texts.append(value)
    elif isinstance(value, (dict, list)):
        if depth >= MAX_DEPTH:
            raise ValueError(f"at most {MAX_DEPTH} levels of nesting in a message, found more")
        if isinstance(value, dict):
            texts.extend(value)
        for part in value.values() if isinstance(value, dict) else value:
            add_texts(part, texts, depth + 1)
