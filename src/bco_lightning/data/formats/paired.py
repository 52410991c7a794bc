"""Pairs of a chosen and a rejected answer: two rows, one right after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from bco_lightning.batch import LeftOut, Message
from bco_lightning.data.feedback_row import Columns, assembled, required, value_at
from bco_lightning.data.formats.record_format import Candidate
from bco_lightning.data.messages import messages_in
from bco_lightning.data.source import RowFormat
from bco_lightning.errors import ConfigError, FeedbackRowError

SAME = "chosen and rejected are the same"


class Paired:
    """Two rows of each record, the chosen answer with a thumbs-up and the rejected one with a thumbs-down."""

    rows_per_record: int | None = 2

    def matches(self, record: Mapping[str, Any], options: RowFormat) -> bool:
        """Whether there is a chosen and a rejected answer."""
        names = (options.columns.chosen, options.columns.rejected)
        return all(value_at(record, name) is not None for name in names)

    def candidates(
        self, record: Mapping[str, Any], place: str, options: RowFormat, *, labelled: bool
    ) -> Iterator[Candidate | LeftOut]:
        """The two rows, the chosen one first; two answers that are the same say nothing and are both left out.

        Raises:
            ConfigError: If a rule of ratings is given, of which there are none here.
            FeedbackRowError: If the record is malformed, or a column is missing.
        """
        if options.rating is not None:
            raise ConfigError("data.rating", "expected no rule of ratings for pairs, found one.", "Leave it out.")
        prompt, chosen, rejected = _parts(record, place, options.columns)
        if chosen == rejected:
            yield LeftOut(place, SAME)
            yield LeftOut(place, SAME)
            return
        all_turns = options.loss_on == "all_turns"
        better, worse = (
            assembled(prompt, completion, place, options.columns, record, all_turns=all_turns)
            for completion in (chosen, rejected)
        )
        for row, thumbs_up in ((better, True), (worse, False)):
            yield Candidate(replace(row, thumbs_up=thumbs_up) if labelled else row, thumbs_up, record)


def _parts(
    record: Mapping[str, Any], place: str, columns: Columns
) -> tuple[list[Message], list[Message], list[Message]]:
    """Prompt, chosen and rejected; of whole conversations, what both begin with is the prompt."""
    chosen, rejected = (
        messages_in(required(record, name, place), name, place, role="assistant")
        for name in (columns.chosen, columns.rejected)
    )
    if chosen[0]["role"] == rejected[0]["role"] == "assistant":
        prompt = messages_in(required(record, columns.prompt, place), columns.prompt, place, role="user")
        return prompt, chosen, rejected
    shared = _num_shared(chosen, rejected, place)
    before = _said_before(value_at(record, columns.prompt), chosen[:shared], columns.prompt, place)
    return before + chosen[:shared], chosen[shared:], rejected[shared:]


def _num_shared(chosen: list[Message], rejected: list[Message], place: str) -> int:
    """Number of messages that both conversations begin with."""
    if chosen == rejected:
        return len(chosen)
    parting = next(
        (number for number, pair in enumerate(zip(chosen, rejected, strict=False)) if pair[0] != pair[1]), None
    )
    if parting is None or not chosen[parting]["role"] == rejected[parting]["role"] == "assistant":
        found = "one that goes on where the other ends" if parting is None else "them part at another message"
        raise FeedbackRowError(
            place, f"expected chosen and rejected conversations to part at an answer of the assistant, found {found}."
        )
    return parting


def _said_before(given: Any, shared: list[Message], name: str, place: str) -> list[Message]:
    """What a column with the prompt adds to conversations that are whole: often nothing, sometimes a system message."""
    if given is None:
        return []
    before = messages_in(given, name, place, role="user")
    contents = {message["content"].strip() for message in shared}
    if all(message["content"].strip() in contents for message in before):
        return []
    if isinstance(given, str):
        raise FeedbackRowError(
            place,
            f"expected {name!r} to be a message of both conversations, found another text.",
            "Set data.columns.prompt to a name that no column has, if the conversations are whole.",
        )
    return before
