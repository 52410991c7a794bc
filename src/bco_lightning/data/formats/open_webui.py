"""Feedback of Open WebUI, as an administrator exports it: a JSON array of ratings with a snapshot of each chat.

The prompt is the branch of the snapshot's tree that leads to the rated message. What a model thought, said and called
stands in the ``output`` of its message since 0.8, a list of items of the Responses API; before, and beside it until
0.9, in its ``content`` as HTML for the interface. Both are brought to items first. Thoughts become
``reasoning_content``, for the chat template to show or not.

Source: the Python packages open-webui 0.6.43, 0.8.0, 0.10.0 and 0.12.4: ``models/feedbacks.py`` (``FeedbackModel``,
version 0 of its data), ``routers/evaluations.py`` (``/api/v1/evaluations/feedbacks/all/export``), ``utils/misc.py``
(``convert_output_to_messages``), ``utils/middleware.py`` (``serialize_content_blocks``, ``serialize_output``,
``outlet_filter_handler``) and the bundled interface (``feedbackHandler``, ``createMessagesList``);
https://docs.openwebui.com, Evaluation.
"""

from __future__ import annotations

import html
import re
from contextlib import suppress
from typing import Any

from bco_lightning.batch import FeedbackRow, LeftOut, Message
from bco_lightning.data.formats.record_format import UNFINISHED, WITH_IMAGE, Candidate, Origin, Rows
from bco_lightning.data.formats.turns import CALL, RESULT, SAID, THOUGHT, branch_to, messages_of
from bco_lightning.data.labels import NO_FEEDBACK
from bco_lightning.data.options import Columns
from bco_lightning.data.values import Record, objects_in, parsed, plain_number, shown, value_at

NO_SNAPSHOT = "no snapshot of the chat"
NOT_IN_SNAPSHOT = "rated message is not in the snapshot"

# Openings and closings are looked for one after the other: a pattern of both takes time that grows with the square.
_DETAILS = re.compile(r'<details\s+type="(\w+)"', re.IGNORECASE)
_ATTRIBUTE = re.compile(r'(\w+)="([^"]*)"')
_DETAILS_END = re.compile(r"</details>\s*", re.IGNORECASE)
_QUOTE = re.compile(r"^> ?", re.MULTILINE)
_THUMBS = {"1": 1, "-1": -1, 0: None, "0": None}


def matches(record: Record, columns: Columns) -> bool:
    """Whether there are the data of a rating and what it refers to."""
    return isinstance(record.get("data"), dict) and isinstance(record.get("meta"), dict) and "type" in record


def candidates(record: Record, origin: Origin) -> Rows:
    """The row of one rating: a thumb, ``None`` for a draw in the arena, beside a rating from 1 to 10."""
    label, rule = origin.columns.label, origin.options.rating
    given, rating = plain_number(value_at(record, "data.rating")), value_at(record, "data.details.rating")
    thumb = _THUMBS.get(given, given) if type(given) in (int, str) else given  # what is no thumb stays as it is
    thumb = thumb if record.get("type") == "rating" else None
    ratings = {"rating": thumb, "details.rating": rating, label: thumb}
    if rule and not rule.column:  # which is for numbers, as thumbs need none
        ratings[label] = rating
    wanted = (rule and rule.column) or label
    if origin.labelled and wanted not in ratings:
        raise origin.error(f"expected a rating {wanted!r}, found {', '.join(map(repr, ratings))}.")
    unrated = origin.labelled and ratings[wanted] is None
    row = origin.left_out(NO_FEEDBACK) if unrated else _row(record, origin)
    yield row if isinstance(row, LeftOut) else Candidate(row, ratings)


def _row(record: Record, origin: Origin) -> FeedbackRow | LeftOut:
    messages = value_at(record, "snapshot.chat.chat.history.messages")
    if not isinstance(messages, dict):
        return origin.left_out(NO_SNAPSHOT)
    branch = branch_to(value_at(record, "meta.message_id"), messages, "parentId")
    if not branch or branch[-1].get("role") != "assistant":
        return origin.left_out(NOT_IN_SNAPSHOT)
    # Images that are not in the export are in the server's files, by their ids.
    kept = ("data:", "http://", "https://")
    if any(node.get("role") != "user" or not str(url).startswith(kept) for node in branch for url in _images(node)):
        return origin.left_out(WITH_IMAGE)
    last = branch[-1].get("output")
    if branch[-1].get("done") is False or any(item.get("status") == "incomplete" for item in objects_in(last)[-1:]):
        return origin.left_out(UNFINISHED)
    turns = (_messages(node, origin) for node in branch)
    return origin.answered(turns, "snapshot", value_at(record, "snapshot.chat.chat.params.system"))


def _messages(node: Record, origin: Origin) -> list[Message] | LeftOut:
    """A turn as the model saw or said it."""
    content, output = node.get("content"), node.get("output")
    content = "" if isinstance(content, str) and not content.strip() else content
    if images := [{"type": "image_url", "image_url": url} for url in _images(node)]:
        content = [*images, {"type": "text", "text": content}]
    if node.get("role") != "assistant":
        return [{"role": node.get("role"), "content": content}]
    if output:
        if not isinstance(output, list) or len(objects_in(output)) < len(output):
            raise origin.error(f"expected a list of items as 'output' of a message, found {shown(output)}.")
        if "originalContent" in node and isinstance(content, str) and (text := _unwrapped(content)[-1])["content"]:
            output = _with_text(output, text)  # which a filter or the user has put in the place of the model's
        return messages_of(output, origin)
    items = _unwrapped(content) if isinstance(content, str) else []
    return messages_of(items, origin) if len(items) > 1 else [{"role": "assistant", "content": content}]


def _images(node: Record) -> list[Any]:
    return [file.get("url") for file in objects_in(node.get("files")) if file.get("type") == "image"]


def _with_text(items: list[Record], text: Record) -> list[Record]:
    """The items with a text in the place of all that was said."""
    last = max((at for at, item in enumerate(items) if item.get("type") == SAID), default=len(items))
    return [*(item for item in items[:last] if item.get("type") != SAID), text, *items[last + 1 :]]


def _unwrapped(text: str) -> list[Record]:
    """The items that a text for the interface stands for: blocks of details, and the texts between them."""
    items: list[Record] = []
    end = 0
    while (
        (opening := _DETAILS.search(text, end))
        and (start := text.find(">", opening.end()) + 1)
        and (closing := _DETAILS_END.search(text, start))
    ):
        items.append({"type": SAID, "content": text[end : opening.start()].strip()})
        attributes = dict(_ATTRIBUTE.findall(text[opening.end() : start]))
        items += _of_details(opening[1].lower(), attributes, text[start : closing.start()])
        end = closing.end()
    return [*items, {"type": SAID, "content": text[end:].strip()}]


def _of_details(kind: str, attributes: dict[str, str], inside: str) -> list[Record]:
    if kind == THOUGHT:
        return [{"type": kind, "content": _plain(inside)}]
    if kind != "tool_calls":
        return [{"type": kind}]
    texts = {name: _unescaped(attributes[name]) for name in ("arguments", "result") if name in attributes}
    # A text that stands there as JSON is that text; JSON of anything else is as it is written.
    known = {name: said if isinstance(said := parsed(text), str) else text for name, text in texts.items()}
    call_id = attributes.get("id")
    call = {"type": CALL, "call_id": call_id, "name": attributes.get("name"), "arguments": known.get("arguments")}
    return [call, {"type": RESULT, "call_id": call_id, "output": known["result"]}] if "result" in known else [call]


def _plain(thought: str) -> str:
    """A thought without the summary, quotation marks and escapes that the interface puts around it."""
    before, _, summary = thought.partition("<summary>")
    _, closing, after = summary.partition("</summary>")
    thought = before.rstrip() + after.lstrip() if closing else thought
    return _QUOTE.sub("", _unescaped(thought)).strip()


def _unescaped(text: str) -> str:
    with suppress(ValueError):  # where the number of a character has more digits than Python reads
        return html.unescape(text)
    return text
