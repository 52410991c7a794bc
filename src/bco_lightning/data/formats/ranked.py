"""Several answers to one prompt, each with a rank, a score or a thumb of its own.

The best and the worst of a ranking are rows, or those that a rule or labels say. A record is a prompt and a list of
answers, a tree of messages, or a conversation that goes on with one of several answers.

Source: the cards of berkeley-nest/Nectar (3c6b4c4) and OpenAssistant/oasst2 (179dd21, the trees), ``oasst_data`` of
LAION-AI/Open-Assistant; for PRISM the scripts in HannahKirk/prism-alignment that make its ``conversations.jsonl``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby

from bco_lightning.batch import Message
from bco_lightning.data.formats.record_format import Candidate, Origin, Rows
from bco_lightning.data.labels import NO_FEEDBACK
from bco_lightning.data.options import Columns
from bco_lightning.data.values import MISSING, Record, objects_in, value_at

BETWEEN = "answer between the best and the worst"
_TEXTS = ("answer", "response", "completion", "text", "content")
_TREE, _HISTORY, _CHOSEN = "prompt", "conversation_history", "if_chosen"
_Questions = Iterator[tuple[list[Message], list[Record]]]


def matches(record: Record, columns: Columns) -> bool:
    """Whether there is a list of answers, a tree, one message of a tree, or a conversation with several answers."""
    return (
        any(any(name in answer for name in _TEXTS) for answer in objects_in(value_at(record, columns.answers)))
        or isinstance(value_at(record, f"{_TREE}.replies"), list)
        or record.get("message_tree_id") is not None
        or any(_CHOSEN in turn for turn in objects_in(record.get(_HISTORY)))
    )


def used(record: Record, columns: Columns) -> list[str]:
    """The columns that its rows are made of."""
    return [columns.prompt, columns.answers, _HISTORY]


def candidates(record: Record, origin: Origin) -> Rows:
    """A row for each answer that has one."""
    found = False
    for prompt, answers in _questions(record, origin):
        found = found or bool(answers)
        yield from _rated(prompt, answers, record, origin)
    if not found:
        yield origin.left_out(NO_FEEDBACK)


def _questions(record: Record, origin: Origin) -> _Questions:
    columns, tree = origin.columns, record.get(_TREE)
    if isinstance(tree, dict) and "replies" in tree:
        yield from _of_tree(tree)
    elif _HISTORY in record:
        yield from _of_history(objects_in(record[_HISTORY]))
    elif "message_tree_id" in record and columns.answers not in record:
        found = "expected a tree of messages, found one message of a tree."
        raise origin.error(found, "Read the file with whole trees in the same repository, *.trees.jsonl.gz.")
    else:
        answers = objects_in(origin.required(record, columns.answers))
        yield origin.messages(origin.required(record, columns.prompt), columns.prompt, "user"), answers


def _of_tree(tree: Record) -> _Questions:
    """What was asked, with all replies of the assistant, from the root on."""
    waiting: list[tuple[list[Message], Record]] = [([], tree)]
    while waiting:
        before, message = waiting.pop()
        said = [*before, {"role": message.get("role"), "content": message.get("text")}]
        replies = objects_in(message.get("replies"))
        yield said, [reply for reply in replies if reply.get("role") == "assistant"]
        waiting += [(said, reply) for reply in reversed(replies)]


def _of_history(turns: list[Record]) -> _Questions:
    """What was asked in each turn, with all answers; it went on with the chosen one."""
    said: list[Message] = []
    for _, group in groupby(turns, key=lambda turn: str(turn.get("turn"))):
        exchange = list(group)
        answers = [turn for turn in exchange if turn.get("role") != "user"]
        said = said + [turn for turn in exchange if turn.get("role") == "user"]
        yield [{"role": turn.get("role"), "content": turn.get("content")} for turn in said], answers
        said = said + [answer for answer in answers if answer.get(_CHOSEN) is True][:1]


def _rated(prompt: list[Message], answers: list[Record], record: Record, origin: Origin) -> Rows:
    labels = [value_at(answer, origin.columns.label, answer.get(_CHOSEN, MISSING)) for answer in answers]
    by_label = origin.options.rating is not None or any(label not in (MISSING, None) for label in labels)
    ranks = [] if by_label else [answer.get("rank") for answer in answers]
    numbers = [rank for rank in ranks if isinstance(rank, (int, float))]
    best, worst = (min(numbers), max(numbers)) if numbers else (0, 0)
    asked = origin.messages(prompt, origin.columns.prompt) if answers else []
    for number, answer in enumerate(answers):
        known = best != worst and not by_label and ranks[number] in (best, worst)
        if origin.labelled and not by_label and not known:
            yield origin.left_out(NO_FEEDBACK if best == worst or ranks[number] not in numbers else BETWEEN)
            continue
        name = next((name for name in _TEXTS if answer.get(name) is not None), _TEXTS[0])
        row = origin.row(asked, origin.messages(origin.required(answer, name), name, "assistant"), record)
        row = replace(row, thumbs_up=ranks[number] == best) if known else row
        chosen = origin.options.rating is None and labels[number] is not MISSING
        yield Candidate(row, answer | {origin.columns.label: labels[number]} if chosen else answer)
