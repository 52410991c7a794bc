"""What exported chats have in common: a tree of messages, and turns of what the assistant thought, called and said.

A turn is a list of items of the Responses API of OpenAI, whatever the export calls its parts.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

from bco_lightning.batch import LeftOut, Message
from bco_lightning.data.formats.record_format import WITH_IMAGE, Origin
from bco_lightning.data.formats.traces import IMAGES
from bco_lightning.data.values import Record, objects_in, shown

WITH_TOOLS = "tool calls whose results the export does not keep as messages"
CALL, RESULT, SAID, THOUGHT = "function_call", "function_call_output", "message", "reasoning"


def branch_to(message_id: Any, messages: Record, parent: str, root: str | None = None) -> list[Record]:
    """The messages that lead to one of them from the first, whose parent is ``root``; none if the way is broken."""
    branch: list[Record] = []
    while message_id not in (None, root):
        message = messages.get(message_id) if isinstance(message_id, str) else None
        if not isinstance(message, dict) or len(branch) > len(messages):
            return []
        branch.append(message)
        message_id = message.get(parent)
    return branch[::-1]


def messages_of(items: list[Record], origin: Origin) -> list[Message] | LeftOut:
    """The messages that items of the Responses API stand for: what the assistant says and calls, and the results."""
    if any(part.get("type") in IMAGES for item in items for part in objects_in(item.get("output"))):
        return origin.left_out(WITH_IMAGE)
    called, given = (
        [str(item.get("call_id")) for item in items if item.get("type") == kind] for kind in (CALL, RESULT)
    )
    if sorted(called) != sorted(given) or any(item.get("type") not in (CALL, RESULT, SAID, THOUGHT) for item in items):
        return origin.left_out(WITH_TOOLS)
    messages: list[Message] = []
    for is_result, group in groupby(items, lambda item: item.get("type") == RESULT):
        if is_result:
            for item in group:
                messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": _text(item, origin)})
            continue
        part = list(group)
        texts, thoughts = ([_text(item, origin) for item in part if item["type"] == kind] for kind in (SAID, THOUGHT))
        message: Message = {"role": "assistant", "content": "\n".join(filter(str.strip, texts))}
        if thought := "\n\n".join(filter(str.strip, thoughts)):
            message["reasoning_content"] = thought
        if calls := [_call(item) for item in part if item["type"] == CALL]:
            message["tool_calls"] = calls
        messages.append(message)
    return messages


def _call(item: Record) -> Message:
    """A call in OpenAI's form, as the model made it, where the interface shows another one."""
    made = item["provider_function"] if isinstance(item.get("provider_function"), dict) else item
    function = {"name": made.get("name"), "arguments": made.get("arguments") or "{}"}
    return {"type": "function", "id": item.get("call_id"), "function": function}


def _text(item: Record, origin: Origin) -> str:
    """What a result, a text, or a thought or its summary says."""
    summary = item["type"] == THOUGHT and item.get("summary")
    key = "output" if item["type"] == RESULT else "summary" if summary else "content"
    parts = item.get(key) or []
    texts = [part.get("text", "") for part in objects_in(parts)] if isinstance(parts, list) else [parts]
    if not all(isinstance(text, str) for text in texts):
        raise origin.error(f"expected a list of texts as {key!r} of an item of 'output', found {shown(parts)}.")
    return "".join(texts)
