"""The messages in what went in and out of a traced call, in the layouts that tracing libraries write.

Source: OpenAI's form of messages, and those of langchain-core 1.8.2 (``dumpd``, ``message_to_dict``, ``model_dump``).
"""

from __future__ import annotations

from typing import Any

from bco_lightning.batch import FeedbackRow, LeftOut
from bco_lightning.data.formats.record_format import NO_ANSWER, NO_PROMPT, UNFINISHED, WITH_IMAGE, Origin
from bco_lightning.data.messages import at_rated_turn
from bco_lightning.data.values import Record, keys_of, objects_in, shown, unpacked, value_at

# LangChain's names of messages, as a class in its serialised form and as a type in its plain form.
_ROLE_OF = {
    "HumanMessage": "user", "AIMessage": "assistant", "SystemMessage": "system", "ToolMessage": "tool",
    "human": "user", "ai": "assistant", "system": "system", "tool": "tool",
    "FunctionMessage": "tool", "function": "tool",
}  # fmt: skip
_ENDED = ("choices[0].finish_reason", "stop_reason")  # of OpenAI, of Anthropic
_HISTORY = ("chat_history", "history")
# Parts of a content, by OpenAI's two interfaces, Anthropic and LangChain.
IMAGES = ("image", "image_url", "input_image", "image_file")


def traced_row(origin: Origin, given: Any, answer: Any, tools: Any = None) -> FeedbackRow | LeftOut:
    """The row of one traced call: text, messages, or an object that holds these went in and came out, or its JSON text.

    If a whole conversation came out, its last assistant turn is rated. Tools may also stand beside the messages.
    """
    given, answer = unpacked(given), unpacked(answer)
    said = _found(answer, "assistant", origin)
    if not any(map(_says_something, said)):
        return origin.left_out(NO_ANSWER)
    ended = [value_at(answer, name) for name in _ENDED] if isinstance(answer, dict) else []
    if "length" in ended or "max_tokens" in ended:  # as its model would not have ended it
        return origin.left_out(UNFINISHED)
    asked = _found(given, "user", origin)
    contents = [message.get("content") for message in objects_in(asked + said)]
    if any(part.get("type") in IMAGES for content in contents for part in objects_in(content)):
        return origin.left_out(WITH_IMAGE)
    completion, num_trailing = origin.messages(said, "output"), 0
    if any(message["role"] == "user" for message in completion):
        prompt, completion, num_trailing = at_rated_turn(completion, "output", origin.place)
    else:
        prompt = origin.messages(asked, "input") if asked else []
    if not prompt:
        return origin.left_out(NO_PROMPT)
    beside = given.get("tools") if isinstance(given, dict) else None
    return origin.row(prompt, completion, {origin.columns.tools: tools or beside}, num_trailing)


def _found(value: Any, role: str, origin: Origin) -> list[Any]:
    """The messages in a value, not yet checked."""
    where, option = ("input", "prompt") if role == "user" else ("output", "completion")
    before: list[Any] = []
    while isinstance(value, dict) and value and not _is_message(value):
        inner = next(filter(None, _containers(value, getattr(origin.columns, option))), None)
        if inner is None:
            found = f"expected text or messages as {where!r}, found {keys_of(value)}."
            raise origin.error(found, f"Name the one that counts by data.columns.{option}.")
        # What an object holds beside its messages: a system prompt, or what was said before a text.
        if isinstance(value.get("system"), str) and value["system"]:
            before.append({"role": "system", "content": value["system"]})
        for history in (value.get(key) for key in _HISTORY if isinstance(inner, str)):
            before += map(_in_openai_form, history if isinstance(history, list) else ())
        value = unpacked(inner)
    if isinstance(value, dict):
        value = [value] if value else []
    if value is None or isinstance(value, str):
        value = [{"role": role, "content": value}] if value else []
    if not isinstance(value, list):
        raise origin.error(f"expected text or messages as {where!r}, found {shown(value)}.")
    nested = len(value) == 1 and isinstance(value[0], list)
    return before + [_in_openai_form(message) for message in (value[0] if nested else value)]


def _containers(value: Record, column: str) -> list[Any]:
    """What may hold the messages of an object, the likeliest first."""
    candidates = [value_at(value, column), value.get("messages")]
    for key in ("choices", "generations"):
        first = value.get(key)
        while isinstance(first, list) and first:
            first = first[0]
        candidates += [first.get("message"), first.get("text")] if isinstance(first, dict) else []
    texts = [text for text in value.values() if isinstance(text, str)]
    return [*candidates, value.get("output"), value.get("input"), texts[0] if len(texts) == 1 else None]


def _is_message(value: Record) -> bool:
    return ("role" in value and ("content" in value or "tool_calls" in value)) or _langchain_kind(value) is not None


def _in_openai_form(message: Any) -> Any:
    kind = _langchain_kind(message) if isinstance(message, dict) else None
    if kind is None:
        return message
    body = next(part for part in (message.get("kwargs"), message.get("data"), message) if isinstance(part, dict))
    calls, more, content = body.get("tool_calls"), body.get("additional_kwargs"), body.get("content")
    if isinstance(content, list):  # where the calls stand once more
        content = [part for part in content if not isinstance(part, dict) or part.get("type") != "tool_use"]
    converted = {
        "role": _ROLE_OF.get(kind, body.get("role", kind)),
        "content": content,
        "tool_calls": [_call_in_openai_form(call) for call in calls] if isinstance(calls, list) else calls,
        "tool_call_id": body.get("tool_call_id"),
        "name": body.get("name"),
        "reasoning_content": more.get("reasoning_content") if isinstance(more, dict) else None,
    }
    return {key: part for key, part in converted.items() if part is not None}


def _langchain_kind(message: Record) -> str | None:
    """The kind of a message of LangChain: serialised, as an object with data, or as the plain model."""
    if message.get("lc") == 1 and isinstance(message.get("id"), list) and isinstance(message.get("kwargs"), dict):
        return str(message["id"][-1]).removesuffix("Chunk") if message["id"] else None
    kind = message.get("type")
    plain = isinstance(kind, str) and kind in _ROLE_OF and "role" not in message
    return kind if plain and ("content" in message or isinstance(message.get("data"), dict)) else None


def _call_in_openai_form(call: Any) -> Any:
    if not isinstance(call, dict) or "args" not in call:
        return call
    function = {"name": call.get("name"), "arguments": call["args"]}
    return {"type": "function", "id": call.get("id"), "function": function}


def _says_something(message: Any) -> bool:
    if not isinstance(message, dict):
        return True
    content = message.get("content")
    return bool(message.get("tool_calls") or (content.strip() if isinstance(content, str) else content))
