"""Pairs of a chosen and a rejected answer: two rows, one right after the other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bco_lightning.batch import Message
from bco_lightning.data.formats.record_format import Candidate, Origin, Rows
from bco_lightning.data.messages import out_of_text
from bco_lightning.data.options import Columns
from bco_lightning.data.values import MISSING, Record, value_at
from bco_lightning.errors import ConfigError

SAME = "both answers are the same"
# What two conversations are compared by: data sets keep other things beside it, such as how many tokens it is.
_SAID = ("role", "content", "tool_calls", "tool_call_id", "reasoning_content")


def matches(record: Record, columns: Columns) -> bool:
    """Whether there is a chosen and a rejected answer."""
    return all(value_at(record, name) is not None for name in (columns.chosen, columns.rejected))


def candidates(record: Record, origin: Origin) -> Rows:
    """The two rows, the chosen one first; two answers that are the same say nothing and are both left out."""
    yield from two_rows(record, origin, (origin.columns.chosen, origin.columns.rejected), thumbs=(True, False))


def used(record: Record, columns: Columns) -> list[str]:
    """The columns that its rows are made of."""
    return [columns.prompt, columns.chosen, columns.rejected]


def two_rows(
    record: Record,
    origin: Origin,
    names: tuple[str, str],
    thumbs: tuple[bool, bool] | None = None,
    labels: tuple[Any, Any] = (MISSING, MISSING),
) -> Rows:
    """The rows of the two answers in these columns, with these thumbs or labels; none if both are the same.

    Of whole conversations, what both begin with is the prompt.
    """
    if thumbs and origin.options.rating is not None:
        raise ConfigError("data.rating", "expected no rule of ratings for pairs, found one.", "Leave it out.")
    column = origin.columns.prompt
    chosen, rejected = (origin.messages(origin.required(record, name), name, "assistant") for name in names)
    if chosen[0]["role"] == rejected[0]["role"] == "assistant":
        prompt = origin.messages(origin.required(record, column), column, "user")
    else:
        shared = _num_shared(chosen, rejected, origin)
        prompt = said_before(record, chosen[:shared], origin) + chosen[:shared]
        chosen, rejected = chosen[shared:], rejected[shared:]
    if [_said(message) for message in chosen] == [_said(message) for message in rejected]:
        yield from [origin.left_out(SAME)] * 2
        return
    rows = [origin.row(prompt, answer, record) for answer in (chosen, rejected)]
    for row, thumb, label in zip(rows, thumbs or (None, None), labels, strict=True):
        yield Candidate(replace(row, thumbs_up=thumb), {origin.columns.label: label})


def _num_shared(chosen: list[Message], rejected: list[Message], origin: Origin) -> int:
    """Number of messages that both conversations begin with."""
    pairs = enumerate(zip(chosen, rejected, strict=False))
    parting = next((at for at, (one, other) in pairs if _said(one) != _said(other)), None)
    if parting is None and len(chosen) == len(rejected):
        return len(chosen)
    if parting is None or not chosen[parting]["role"] == rejected[parting]["role"] == "assistant":
        found = "one that goes on where the other ends" if parting is None else "them part at another message"
        raise origin.error(f"expected both conversations to part at an answer of the assistant, found {found}.")
    if parting and chosen[parting - 1]["role"] == "assistant":
        raise origin.error("expected turns between assistant messages, found two in a row.")
    return parting


def _said(message: Message) -> tuple[Any, ...]:
    return tuple(message.get(key) for key in _SAID)


def said_before(record: Record, shared: list[Message], origin: Origin) -> list[Message]:
    """What a column with the prompt adds to conversations that are whole: often nothing, sometimes a system message."""
    given = value_at(record, name := origin.columns.prompt)
    if given is None:
        return []
    before = origin.messages(given, name, "user")
    contents = {message["content"].strip() for message in shared}
    if all(message["content"].strip() in contents for message in before):
        return []
    if isinstance(out_of_text(given, name, origin.place), str):
        remedy = "Set data.columns.prompt to a name that no column has, if the conversations are whole."
        raise origin.error(f"expected {name!r} to be a message of the conversations, found another text.", remedy)
    return before
