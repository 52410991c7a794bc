"""Pairs of a chosen and a rejected answer: two rows, one right after the other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bco_lightning.batch import Message
from bco_lightning.data.formats.record_format import Candidate, Origin, Rows
from bco_lightning.data.messages import out_of_text
from bco_lightning.data.options import Columns
from bco_lightning.data.values import Record, value_at
from bco_lightning.errors import ConfigError

SAME = "chosen and rejected are the same"


def matches(record: Record, columns: Columns) -> bool:
    """Whether there is a chosen and a rejected answer."""
    return all(value_at(record, name) is not None for name in (columns.chosen, columns.rejected))


def candidates(record: Record, origin: Origin) -> Rows:
    """The two rows, the chosen one first; two answers that are the same say nothing and are both left out."""
    if origin.options.rating is not None:
        raise ConfigError("data.rating", "expected no rule of ratings for pairs, found one.", "Leave it out.")
    prompt, chosen, rejected = _parts(record, origin)
    if chosen == rejected:
        yield from (origin.left_out(SAME), origin.left_out(SAME))
        return
    better, worse = (origin.row(prompt, completion, record) for completion in (chosen, rejected))
    for row, thumbs_up in ((better, True), (worse, False)):
        yield Candidate(replace(row, thumbs_up=thumbs_up), thumbs_up, record)


def _parts(record: Record, origin: Origin) -> tuple[list[Message], list[Message], list[Message]]:
    """Prompt, chosen and rejected; of whole conversations, what both begin with is the prompt."""
    columns = origin.columns
    chosen, rejected = (
        origin.messages(origin.required(record, name), name, "assistant") for name in (columns.chosen, columns.rejected)
    )
    if chosen[0]["role"] == rejected[0]["role"] == "assistant":
        return origin.messages(origin.required(record, columns.prompt), columns.prompt, "user"), chosen, rejected
    shared = _num_shared(chosen, rejected, origin)
    before = _said_before(value_at(record, columns.prompt), chosen[:shared], origin)
    return before + chosen[:shared], chosen[shared:], rejected[shared:]


def _num_shared(chosen: list[Message], rejected: list[Message], origin: Origin) -> int:
    """Number of messages that both conversations begin with."""
    if chosen == rejected:
        return len(chosen)
    differing = (at for at, pair in enumerate(zip(chosen, rejected, strict=False)) if pair[0] != pair[1])
    parting = next(differing, None)
    if parting is None or not chosen[parting]["role"] == rejected[parting]["role"] == "assistant":
        found = "one that goes on where the other ends" if parting is None else "them part at another message"
        raise origin.error(
            f"expected chosen and rejected conversations to part at an answer of the assistant, found {found}."
        )
    if parting and chosen[parting - 1]["role"] == "assistant":
        raise origin.error("expected turns between assistant messages, found two in a row.")
    return parting


def _said_before(given: Any, shared: list[Message], origin: Origin) -> list[Message]:
    """What a column with the prompt adds to conversations that are whole: often nothing, sometimes a system message."""
    if given is None:
        return []
    name = origin.columns.prompt
    before = origin.messages(given, name, "user")
    contents = {message["content"].strip() for message in shared}
    if all(message["content"].strip() in contents for message in before):
        return []
    if isinstance(out_of_text(given, name, origin.place), str):
        raise origin.error(
            f"expected {name!r} to be a message of both conversations, found another text.",
            "Set data.columns.prompt to a name that no column has, if the conversations are whole.",
        )
    return before
