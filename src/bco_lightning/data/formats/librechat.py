"""Conversations of LibreChat, one to a file, as its interface exports them as JSON, with all branches or nested.

Source: danny-avila/LibreChat, ``packages/data-schemas/src/schema/message.ts``,
``client/src/hooks/Conversations/useExportConversation.ts`` and ``hooks/Messages/useBuildMessageTree.ts``, as of 2026.
"""

from __future__ import annotations

from bco_lightning.batch import FeedbackRow, LeftOut, Message
from bco_lightning.data.formats.chainlit import ERROR_ANSWER
from bco_lightning.data.formats.record_format import NO_ANSWER, UNFINISHED, WITH_IMAGE, Candidate, Origin, Rows
from bco_lightning.data.formats.turns import CALL, RESULT, SAID, THOUGHT, branch_to, messages_of
from bco_lightning.data.labels import NO_FEEDBACK
from bco_lightning.data.options import Columns
from bco_lightning.data.values import Record, objects_in, value_at

BROKEN = "rated message does not lead to a first one"
_ROOT = "00000000-0000-0000-0000-000000000000"  # the parent of a first message


def matches(record: Record, columns: Columns) -> bool:
    """Whether there are a conversation's id and its messages."""
    return "conversationId" in record and ("messages" in record or "messagesTree" in record)


def candidates(record: Record, origin: Origin) -> Rows:
    """A row for each answer that was rated."""
    said = _flat(objects_in(record.get("messages", record.get("messagesTree"))))
    known = {str(message.get("messageId")): message for message in said}
    answers = [message for message in said if not message.get("isCreatedByUser")]
    if not answers:
        yield origin.left_out(NO_ANSWER)
    for answer in answers:
        label = value_at(answer, "feedback.rating")
        unrated = origin.labelled and label is None
        row = origin.left_out(NO_FEEDBACK) if unrated else _row(answer, known, record, origin)
        yield row if isinstance(row, LeftOut) else Candidate(row, {origin.columns.label: label})


def _row(answer: Record, known: Record, record: Record, origin: Origin) -> FeedbackRow | LeftOut:
    branch = branch_to(answer.get("messageId"), known, "parentMessageId", _ROOT)
    if not branch:
        return origin.left_out(BROKEN)
    if branch[-1].get("error"):
        return origin.left_out(ERROR_ANSWER)
    if branch[-1].get("unfinished") or branch[-1].get("finish_reason") == "length":
        return origin.left_out(UNFINISHED)
    turns = (_turn(message, origin) for message in branch)
    return origin.answered(turns, "messages", value_at(record, "options.promptPrefix"))


def _turn(message: Record, origin: Origin) -> list[Message] | LeftOut:
    asked = message.get("isCreatedByUser")
    parts = [] if asked else objects_in(message.get("content"))
    if any(str(part.get("type")).startswith("image") for part in [*objects_in(message.get("files")), *parts]):
        return origin.left_out(WITH_IMAGE)
    if not parts:
        return [{"role": "user" if asked else "assistant", "content": message.get("text")}]
    return messages_of([item for part in parts for item in _items(part)], origin)


def _items(part: Record) -> list[Record]:
    """The items that a part of an answer stands for; one of its type alone if it is not read."""
    text, call = part.get("text"), part.get("tool_call")
    if part.get("type") == "text":
        return [{"type": SAID, "content": value_at(text, "value") if isinstance(text, dict) else text}]
    if part.get("type") == "think":
        return [{"type": THOUGHT, "content": part.get("think")}]
    if not isinstance(call, dict) or not isinstance(call.get("output"), str):
        return [{"type": part.get("type")}]
    made = {"type": CALL, "call_id": call.get("id"), "name": call.get("name"), "arguments": call.get("args")}
    return [made, {"type": RESULT, "call_id": call.get("id"), "output": call["output"]}]


def _flat(messages: list[Record]) -> list[Record]:
    """All messages of a list or a tree, each after its parent."""
    flat: list[Record] = []
    waiting = messages[::-1]
    while waiting:
        flat.append(waiting.pop())
        waiting += objects_in(flat[-1].get("children"))[::-1]
    return flat
