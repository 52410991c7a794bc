"""Rows of a prompt and a rated completion, or of a whole conversation whose last turn is rated."""

from __future__ import annotations

from bco_lightning.batch import FeedbackRow, Message
from bco_lightning.data.formats.paired import said_before
from bco_lightning.data.formats.record_format import Candidate, Origin, Rows
from bco_lightning.data.messages import at_rated_turn, out_of_text
from bco_lightning.data.options import Columns
from bco_lightning.data.values import Record, from_json_text, value_at

_USUAL_NAMES = ("messages", "conversation", "conversations", "chat")


def matches(record: Record, columns: Columns) -> bool:
    """Whether there is a completion or a conversation."""
    completion, conversation = columns_of(record, columns)
    if value_at(record, completion) is not None:
        return True
    messages = value_at(record, conversation) if conversation else None
    # The JSON text of one or of each message is as good; an empty list tells nothing.
    return isinstance(messages, str) or (
        isinstance(messages, list) and bool(messages) and all(isinstance(part, (dict, str)) for part in messages)
    )


def candidates(record: Record, origin: Origin) -> Rows:
    """The row; every column of the record is a rating that a rule can name."""
    yield Candidate(unrated_row(record, origin), record)


def used(record: Record, columns: Columns) -> list[str]:
    """The columns that its row is made of, beside the label."""
    completion, conversation = columns_of(record, columns)
    return [conversation] if conversation else [columns.prompt, completion]


def unrated_row(record: Record, origin: Origin) -> FeedbackRow:
    """The row of a record in columns, whatever holds its conversation."""
    name, conversation = columns_of(record, origin.columns)
    before: list[Message] = []
    if conversation is None:
        given = origin.required(record, column := origin.columns.prompt, name)
        said = origin.messages(value_at(record, name), name, "assistant")
        if said[0]["role"] == "assistant" or said[-1]["role"] != "assistant":
            return origin.row(origin.messages(given, column, "user"), said, record)
        before = said_before(record, said, origin)  # for this is the whole conversation, as KTO-mix-15k has it
    else:
        name = conversation
        given = out_of_text(value_at(record, name), name, origin.place)
        said = origin.messages(from_json_text(given, name, origin.place), name)
    prompt, completion, num_trailing = at_rated_turn(said, name, origin.place)
    return origin.row(before + prompt, completion, record, num_trailing)


def columns_of(record: Record, columns: Columns) -> tuple[str, str | None]:
    """The column with the completion, and that with a whole conversation if the row stands in one."""
    # HelpSteer2 and others call it ``response``.
    usual = columns.completion == "completion" and "completion" not in record and "response" in record
    completion = "response" if usual else columns.completion
    named = columns.messages not in _USUAL_NAMES
    if not named and value_at(record, completion) is not None:
        return completion, None
    names = (columns.messages,) if named else _USUAL_NAMES
    return completion, next((name for name in names if value_at(record, name) is not None), None)
