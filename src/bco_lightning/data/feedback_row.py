"""Turn one record of a feedback log into a :class:`FeedbackRow`, or say which line is wrong and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from bco_lightning.batch import FeedbackRow, LeftOut, Message
from bco_lightning.data.labels import LabelVocabulary
from bco_lightning.data.messages import check_size, from_json_text, messages_in, shown, texts_in, without_nulls
from bco_lightning.data.options import Columns
from bco_lightning.errors import FeedbackRowError

__all__ = [
    "Columns",
    "LabelVocabulary",
    "assembled",
    "completion_column",
    "keys_of",
    "parse_row",
    "plain_row",
    "rated",
    "required",
    "shown",
    "texts_in",
    "value_at",
]

_MISSING = object()
# What a row may not tell the chat template: what this package itself says, and how the template is called.
_RESERVED_OPTIONS = frozenset({
    "self", "conversation", "messages", "tools", "chat_template", "tokenize", "tokenizer_kwargs",
    "add_generation_prompt", "continue_final_message", "padding", "truncation", "max_length", "return_tensors",
    "return_dict", "return_assistant_tokens_mask",
})  # fmt: skip


def parse_row(
    record: Mapping[str, Any], place: str, columns: Columns, labels: LabelVocabulary | None
) -> FeedbackRow | LeftOut:
    """Validates one record that has a prompt, a completion and a label.

    Args:
        record: A line of the log.
        place: File and line, for messages.
        columns: Names of the columns.
        labels: The source's label vocabulary; ``None`` when labels are not needed (prediction).

    Returns:
        The row with prompt and completion as messages, or that its label leaves it out.

    Raises:
        FeedbackRowError: If a column is missing, empty, of the wrong type or over a limit, or the label is unknown.
    """
    row = plain_row(record, place, columns)
    return row if labels is None else rated(row, labels.thumbs_up(required(record, columns.label, place), place))


def plain_row(record: Mapping[str, Any], place: str, columns: Columns, *, all_turns: bool = False) -> FeedbackRow:
    """The row of a record that has a prompt and a completion; see :func:`assembled` and :func:`parse_row`."""
    prompt = _messages(record, columns.prompt, place, role="user")
    completion = _messages(record, completion_column(record, columns), place, role="assistant")
    return assembled(prompt, completion, place, columns, record, all_turns=all_turns)


def assembled(
    prompt: list[Message],
    completion: list[Message],
    place: str,
    columns: Columns,
    record: Mapping[str, Any],
    *,
    all_turns: bool = False,
    num_trailing: int = 0,
) -> FeedbackRow:
    """A row without a thumb, of messages that are valid each for itself.

    Args:
        prompt: What was said before.
        completion: What is rated.
        place: File and line, for messages.
        columns: Names of the columns.
        record: Where tools and options of the template stand, if there are any.
        all_turns: Whether the completion begins with the first answer of the assistant.
        num_trailing: Messages after the rated turn.

    Raises:
        FeedbackRowError: If there is no prompt, the completion does not begin and end with the assistant, or the row
            is over a limit.
    """
    if all_turns and len(prompt) > 1:
        first = next(
            (number for number, message in enumerate(prompt) if number and message["role"] == "assistant"), None
        )
        if first is not None:
            prompt, completion = prompt[:first], prompt[first:] + completion
    if not prompt:
        raise FeedbackRowError(place, "expected a prompt before what the assistant says, found none.")
    if completion[0]["role"] != "assistant" or completion[-1]["role"] != "assistant":
        raise FeedbackRowError(
            place,
            f"the completion must begin and end with an assistant message, found {len(completion)} messages, the first "
            f"by {completion[0]['role']}, the last by {completion[-1]['role']}.",
        )
    tools = _tools(record, columns.tools, place)
    options = _template_options(record, columns.template_options, place)
    check_size([*prompt, *completion, *(tools or ()), *([options] if options else ())], place)
    return FeedbackRow(prompt, completion, None, place, tools, options, num_trailing)


def completion_column(record: Mapping[str, Any], columns: Columns) -> str:
    """The column with the completion; HelpSteer2 and others call it ``response``."""
    usual = columns.completion == "completion" and "completion" not in record and "response" in record
    return "response" if usual else columns.completion


def rated(row: FeedbackRow, thumb: bool | LeftOut) -> FeedbackRow | LeftOut:
    """The row with its thumb, or that it is left out."""
    if isinstance(thumb, LeftOut):
        return thumb
    # Four times as fast as dataclasses.replace, and this is done for every row.
    return FeedbackRow(row.prompt, row.completion, thumb, row.place, row.tools, row.template_options, row.num_trailing)


def value_at(record: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """What a record holds under a name, which may reach into nested objects.

    Example:
        >>> value_at({"feedback": {"score": 1}}, "feedback.score"), value_at({"a.b": 2}, "a.b"), value_at({}, "a.b")
        (1, 2, None)
    """
    value = record.get(name, _MISSING)
    if value is not _MISSING:
        return value
    first, dot, rest = name.partition(".")
    inner = record.get(first) if dot else None
    return value_at(inner, rest, default) if isinstance(inner, Mapping) else default


def required(record: Mapping[str, Any], column: str, place: str) -> Any:
    """What stands in a column.

    Raises:
        FeedbackRowError: If there is no such column.
    """
    value = value_at(record, column, _MISSING)
    if value is _MISSING:
        raise FeedbackRowError(
            place,
            f"expected a column {column!r}, found {keys_of(record)}.",
            "Rename the column, or set data.columns.",
        )
    return value


def _messages(record: Mapping[str, Any], column: str, place: str, role: str) -> list[Message]:
    value = required(record, column, place)
    if isinstance(value, str) and value and not value.isspace():
        return [{"role": role, "content": value}]
    return messages_in(value, column, place, role)


def _tools(record: Mapping[str, Any], column: str, place: str) -> list[dict[str, Any]] | None:
    given = value_at(record, column)
    tools = without_nulls(from_json_text(given, column, place)) if given else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise FeedbackRowError(place, f"{column!r} must be a list of JSON schemas, found {shown(tools)}.")
    return tools


def _template_options(record: Mapping[str, Any], column: str, place: str) -> dict[str, Any]:
    given = value_at(record, column)
    options = without_nulls(from_json_text(given, column, place)) if given else None
    if not options:
        return {}
    if not isinstance(options, dict):
        raise FeedbackRowError(place, f"{column!r} must be an object, found {shown(options)}.")
    for name in options:
        if name in _RESERVED_OPTIONS or name.endswith("_token"):
            raise FeedbackRowError(
                place, f"{column!r} must hold options of the template, found {keys_of([name])}, which is none."
            )
    return options


def keys_of(record: Iterable[str]) -> str:
    """The names of a record's columns, or other keys of it, for a message."""
    # A name of a column is an identifier; what is none may be a text that stands in the wrong place.
    keys = [repr(key) if str(key).isidentifier() and len(str(key)) <= 32 else shown(key) for key in record]
    return ", ".join(keys[:10]) + (f" and {len(keys) - 10} more" if len(keys) > 10 else "") or "none"
