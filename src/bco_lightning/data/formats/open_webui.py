"""Feedback of Open WebUI, as an administrator exports it: a JSON array of ratings with a snapshot of each chat.

The prompt is the branch of the snapshot's tree that leads to the rated message. What a model thought stands in its
message as HTML for the interface; it becomes ``reasoning_content``, for the chat template to show or not.

Source: open-webui/open-webui 0.6 to 0.8, ``backend/open_webui/models/feedbacks.py`` (``FeedbackModel``, version 0 of
its data) and ``routers/evaluations.py`` (``/api/v1/evaluations/feedbacks/all/export``),
``src/lib/components/chat/Messages/ResponseMessage.svelte`` (``feedbackHandler``), ``src/lib/utils/index.ts``
(``createMessagesList``, ``processDetails``); https://docs.openwebui.com, Evaluation.
"""

from __future__ import annotations

import html
import re
from contextlib import suppress
from typing import Any

from bco_lightning.batch import FeedbackRow, LeftOut, Message
from bco_lightning.data.formats.record_format import WITH_IMAGE, Candidate, Origin, Rows
from bco_lightning.data.labels import NO_FEEDBACK
from bco_lightning.data.options import Columns
from bco_lightning.data.values import Record, objects_in, plain_number, value_at

NO_SNAPSHOT = "no snapshot of the chat"
NOT_IN_SNAPSHOT = "rated message is not in the snapshot"
WITH_TOOLS = "answer with tool calls that the export keeps no messages of"

# Openings and closings are looked for one after the other: a pattern of both takes time that grows with the square.
_DETAILS = re.compile(r'<details\s+type="(\w+)"', re.IGNORECASE)
_DETAILS_END = re.compile(r"</details>\s*", re.IGNORECASE)
_SUMMARY, _SUMMARY_END = re.compile("<summary>", re.IGNORECASE), re.compile("</summary>", re.IGNORECASE)
_QUOTE = re.compile(r"^> ?", re.MULTILINE)
_THUMBS = {"1": 1, "-1": -1, 0: None, "0": None}


def matches(record: Record, columns: Columns) -> bool:
    """Whether there are the data of a rating and what it refers to."""
    return isinstance(record.get("data"), dict) and isinstance(record.get("meta"), dict) and "type" in record


def candidates(record: Record, origin: Origin) -> Rows:
    """The row of one rating."""
    label, rule = origin.columns.label, origin.options.rating
    ratings = _ratings(record, label)
    wanted = (rule and rule.column) or label
    if origin.labelled and wanted not in ratings:
        raise origin.error(f"expected a rating {wanted!r}, found {', '.join(map(repr, ratings))}.")
    if origin.labelled and ratings[wanted] is None:
        yield origin.left_out(NO_FEEDBACK)
        return
    row = _row(record, origin)
    yield row if isinstance(row, LeftOut) else Candidate(row, ratings[label], ratings)


def _ratings(record: Record, label: str) -> dict[str, Any]:
    """The thumb, ``None`` for a draw in the arena, and the rating from 1 to 10; what is no thumb stays as it is."""
    given = plain_number(value_at(record, "data.rating"))
    thumb = _THUMBS.get(given, given) if type(given) in (int, str) else given
    thumb = thumb if record.get("type") == "rating" else None
    return {"rating": thumb, "details.rating": value_at(record, "data.details.rating"), label: thumb}


def _row(record: Record, origin: Origin) -> FeedbackRow | LeftOut:
    messages = value_at(record, "snapshot.chat.chat.history.messages")
    if not isinstance(messages, dict):
        return origin.left_out(NO_SNAPSHOT)
    branch = _branch(messages, value_at(record, "meta.message_id"))
    if not branch or branch[-1].get("role") != "assistant":
        return origin.left_out(NOT_IN_SNAPSHOT)
    if any(file.get("type") == "image" for message in branch for file in objects_in(message.get("files"))):
        return origin.left_out(WITH_IMAGE)
    answer, calls = _message(branch[-1])
    if calls:
        return origin.left_out(WITH_TOOLS)
    system = value_at(record, "snapshot.chat.chat.params.system")
    told = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
    return origin.answered([*told, *(_message(node)[0] for node in branch[:-1])], answer, "snapshot")


def _branch(messages: Record, message_id: Any) -> list[Record]:
    """The messages from the root of the tree to the rated one; none if the way is broken."""
    branch: list[Record] = []
    while message_id is not None:
        message = messages.get(message_id) if isinstance(message_id, str) else None
        if not isinstance(message, dict) or len(branch) > len(messages):
            return []
        branch.append(message)
        message_id = message.get("parentId")
    return branch[::-1]


def _message(node: Record) -> tuple[Message, bool]:
    """A message as the model saw or said it, and whether it held anything but text and thoughts."""
    content: Any = node.get("content")
    if isinstance(content, str) and not content.strip():
        content = ""
    said = isinstance(content, str) and node.get("role") == "assistant"
    blocks, rest = _without_details(content) if said else ([], "")
    if not blocks:
        return {"role": node.get("role"), "content": content}, False
    message: Message = {"role": "assistant", "content": rest.strip()}
    thoughts = [_plain(text) for kind, text in blocks if kind.lower() == "reasoning"]
    if thoughts:
        message["reasoning_content"] = "\n\n".join(thoughts)
    return message, len(thoughts) < len(blocks)


def _without_details(text: str) -> tuple[list[tuple[str, str]], str]:
    """Kind and content of each block of details, and the text without them."""
    blocks: list[tuple[str, str]] = []
    rest, end = [], 0
    while (
        (opening := _DETAILS.search(text, end))
        and (start := text.find(">", opening.end()) + 1)
        and (closing := _DETAILS_END.search(text, start))
    ):
        blocks.append((opening[1], text[start : closing.start()]))
        rest.append(text[end : opening.start()])
        end = closing.end()
    return blocks, "".join([*rest, text[end:]])


def _plain(thought: str) -> str:
    """A thought without the summary, quotation marks and escapes that the interface puts around it."""
    opening = _SUMMARY.search(thought)
    closing = _SUMMARY_END.search(thought, opening.end()) if opening else None
    if opening and closing:
        thought = thought[: opening.start()].rstrip() + thought[closing.end() :].lstrip()
    with suppress(ValueError):  # where the number of a character has more digits than Python reads
        thought = html.unescape(thought)
    return _QUOTE.sub("", thought).strip()
