"""Conversations of two people with three ratings, from the PyPI package ``chitchat-dataset``.

Each conversation is a row whose last turn is rated: who spoke last is taken for the assistant. One that the assistant
begins stays as it is, so the chat template has to take that.

Source: chitchat-dataset 0.9.0 (MIT), ``chitchat_dataset/dataset.json`` and its description on PyPI.
"""

from __future__ import annotations

from itertools import groupby

from bco_lightning.batch import LeftOut
from bco_lightning.data.formats.record_format import Candidate, Origin, Rows
from bco_lightning.data.labels import NO_FEEDBACK, thumb_by_rule
from bco_lightning.data.messages import MAX_ROW_MESSAGES
from bco_lightning.data.options import Columns
from bco_lightning.data.values import Record, keys_of
from bco_lightning.errors import ConfigError

NOT_TWO_SPEAKERS = "conversation of other than two speakers"
TOO_MANY_TURNS = f"conversation of more than {MAX_ROW_MESSAGES} turns"


def matches(record: Record, columns: Columns) -> bool:
    """Whether there are turns that are lists of utterances."""
    turns = record.get("messages")
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], list) and "start" in record


def candidates(record: Record, origin: Origin) -> Rows:
    """The row of one conversation; its ratings come before its turns in what it is left out for."""
    ratings = record["ratings"] if isinstance(record.get("ratings"), dict) else {}
    left_out = _by_ratings(ratings, origin) if origin.labelled else None
    try:
        spoken = [(utterance["sender"], utterance["text"].strip()) for turn in record["messages"] for utterance in turn]
        if not all(isinstance(sender, str) for sender, _ in spoken):
            raise TypeError
        # All that someone said in a row is one turn of several lines.
        runs = groupby((one for one in spoken if one[1]), lambda one: one[0])
        turns = [(sender, "\n".join(text for _, text in run)) for sender, run in runs]
    except (TypeError, KeyError, AttributeError) as error:
        raise origin.error("expected utterances with 'sender' and 'text', found something else.") from error
    reason = NOT_TWO_SPEAKERS if len({who for who, _ in turns}) != 2 else ""
    reason = TOO_MANY_TURNS if len(turns) > MAX_ROW_MESSAGES and not reason else reason
    if left_out or reason:
        yield left_out or origin.left_out(reason)
        return
    said = [{"role": "assistant" if who == turns[-1][0] else "user", "content": text} for who, text in turns]
    messages = origin.messages(said, "messages")
    yield Candidate(origin.row(messages[:-1], messages[-1:]), ratings)


def _by_ratings(ratings: Record, origin: Origin) -> LeftOut | None:
    if not ratings:
        return origin.left_out(NO_FEEDBACK)
    rule = origin.options.rating
    if rule is None or rule.column is None:
        expected = f"expected a rule for one of the ratings {', '.join(sorted(ratings))}, found none."
        raise ConfigError("data.rating", expected)
    if rule.column not in ratings:
        raise origin.error(f"expected a rating {rule.column!r}, found {keys_of(sorted(ratings))}.")
    thumb = thumb_by_rule(rule, ratings, origin.columns.label, origin.place)
    return thumb if isinstance(thumb, LeftOut) else None
