"""Pairs of a chosen and a rejected answer: two rows, one right after the other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bco_lightning.batch import FeedbackRow, Message
from bco_lightning.data.formats.record_format import Candidate, Origin, Rows
from bco_lightning.data.messages import out_of_text
from bco_lightning.data.options import Columns
from bco_lightning.data.values import Record, value_at
from bco_lightning.errors import ConfigError

SAME = "both answers are the same"
# What two conversations are compared by: data sets keep other things beside it, such as how many tokens it is.
_SAID = ("role", "content", "tool_calls", "tool_call_id", "reasoning_content")


def matches(record: Record, columns: Columns) -> bool:
    """Whether there is a chosen and a rejected answer."""
    return all(value_at(record, name) is not None for name in (columns.chosen, columns.rejected))


def candidates(record: Record, origin: Origin) -> Rows:
    """The two rows, the chosen one first; two answers that are the same say nothing and are both left out."""
    yield from with_thumbs(record, origin, (origin.columns.chosen, origin.columns.rejected), (True, False))


def used(record: Record, columns: Columns) -> list[str]:
    """The columns that its rows are made of."""
    return [columns.prompt, columns.chosen, columns.rejected]


def with_thumbs(record: Record, origin: Origin, names: tuple[str, str], thumbs: tuple[bool, bool]) -> Rows:
    """The rows of the two answers in these columns, with these thumbs."""
    if origin.options.rating is not None:
        raise ConfigError("data.rating", "expected no rule of ratings for pairs, found one.", "Leave it out.")
    rows = two_rows(record, origin, names)
    if not rows:
        yield from (origin.left_out(SAME), origin.left_out(SAME))
    for row, thumbs_up in zip(rows, thumbs, strict=False):
        yield Candidate(replace(row, thumbs_up=thumbs_up), thumbs_up, record)


def two_rows(record: Record, origin: Origin, names: tuple[str, str]) -> list[FeedbackRow]:
    """The rows of the two answers in these columns, without a thumb; none if they are the same."""
    prompt, *answers = _parts(record, origin, names)
    same = [_said(message) for message in answers[0]] == [_said(message) for message in answers[1]]
    return [] if same else [origin.row(prompt, answer, record) for answer in answers]


def _parts(
    record: Record, origin: Origin, names: tuple[str, str]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Prompt and answers; of whole conversations, what both begin with is the prompt."""
    columns = origin.columns
    chosen, rejected = (origin.messages(origin.required(record, name), name, "assistant") for name in names)
    if chosen[0]["role"] == rejected[0]["role"] == "assistant":
        return origin.messages(origin.required(record, columns.prompt), columns.prompt, "user"), chosen, rejected
    shared = _num_shared(chosen, rejected, origin)
    before = said_before(record, chosen[:shared], origin)
    return before + chosen[:shared], chosen[shared:], rejected[shared:]


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
        raise origin.error(
            f"expected {name!r} to be a message of the conversations, found another text.",
            "Set data.columns.prompt to a name that no column has, if the conversations are whole.",
        )
    return before
