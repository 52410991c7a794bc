"""Rows of a prompt and a rated completion, or of a whole conversation whose last turn is rated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bco_lightning.batch import FeedbackRow
from bco_lightning.data.feedback_row import Columns, assembled, completion_column, plain_row, required, value_at
from bco_lightning.data.formats.record_format import Candidate
from bco_lightning.data.messages import at_rated_turn, from_json_text, messages_in
from bco_lightning.data.source import RowFormat

_USUAL_NAMES = ("messages", "conversation", "conversations", "chat")


class Unpaired:
    """One row of each record."""

    rows_per_record: int | None = 1

    def matches(self, record: Mapping[str, Any], options: RowFormat) -> bool:
        """Whether there is a completion or a conversation."""
        if _has_completion(record, options.columns):
            return True
        column = _conversation(record, options.columns)
        messages = None if column is None else value_at(record, column)
        return isinstance(messages, str) or (
            isinstance(messages, list) and all(isinstance(message, Mapping) for message in messages)
        )

    def candidates(
        self, record: Mapping[str, Any], place: str, options: RowFormat, *, labelled: bool
    ) -> Iterator[Candidate]:
        """The row; every column of the record is a rating that a rule can name."""
        row = unrated_row(record, place, options)
        if labelled and options.rating is None:
            label = required(record, options.columns.label, place)
        else:
            label = value_at(record, options.columns.label)
        yield Candidate(row, label, record)


def unrated_row(record: Mapping[str, Any], place: str, options: RowFormat) -> FeedbackRow:
    """The row of a record in columns, whatever holds its conversation.

    Raises:
        FeedbackRowError: If there are no such columns, or their messages are malformed.
    """
    columns, all_turns = options.columns, options.loss_on == "all_turns"
    column = _conversation(record, columns)
    if column is None:
        return plain_row(record, place, columns, all_turns=all_turns)
    messages = messages_in(from_json_text(value_at(record, column), column, place), column, place)
    prompt, completion, num_trailing = at_rated_turn(messages, column, place)
    return assembled(prompt, completion, place, columns, record, all_turns=all_turns, num_trailing=num_trailing)


def _has_completion(record: Mapping[str, Any], columns: Columns) -> bool:
    return value_at(record, completion_column(record, columns)) is not None


def _conversation(record: Mapping[str, Any], columns: Columns) -> str | None:
    """The column with the whole conversation, if the row stands in one."""
    named = columns.messages not in _USUAL_NAMES
    if not named and _has_completion(record, columns):
        return None
    names = (columns.messages,) if named else _USUAL_NAMES
    return next((name for name in names if value_at(record, name) is not None), None)
