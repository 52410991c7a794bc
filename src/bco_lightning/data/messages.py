"""Chat messages, checked and brought to one form."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from typing import Any

from bco_lightning.batch import Message
from bco_lightning.data.values import add_texts, shown, unpacked, without_nulls
from bco_lightning.errors import FeedbackRowError

# Limits of a row, so that a single one cannot stall the start: about 250,000 tokens of English, and some 0.2 seconds of
# chat template, which is rendered once for each message of a completion.
MAX_ROW_CHARACTERS = 1_000_000
MAX_ROW_MESSAGES = 500

ROLES = ("system", "user", "assistant", "tool")
# Beside OpenAI's names, its later one for system, and those of the ShareGPT layout ({"from": "human", "value": ...}).
_ROLE_OF = {**{role: role for role in ROLES}, "developer": "system", "human": "user", "gpt": "assistant"}
_TEXT_PARTS = ("text", "input_text", "output_text")
_MAY_BE_EMPTY = ("system", "tool")


def messages_in(value: Any, name: str, place: str, role: str = "") -> list[Message]:
    """The messages of a column in OpenAI's layout or ShareGPT's, or a text that ``role`` says.

    Each gets a role out of ``ROLES`` and a text as content; other keys, such as ``tool_calls`` and
    ``reasoning_content``, are left for the chat template. Keys without a value, with which a Parquet file fills up, are
    gone; the arguments of a tool call are an object where they were the JSON text of one.
    """
    if role and isinstance(value, str):
        value = [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        form = "text or a list of chat messages" if role else "a list of chat messages"
        found = f"a value of type {type(value).__name__}" if value else "an empty list"
        found = "nothing (null)" if value is None else found
        raise FeedbackRowError(place, f"{name!r} must be {form}, found {found}.")
    return [_message(message, number, name, place) for number, message in enumerate(value, 1)]


def at_rated_turn(messages: list[Message], name: str, place: str) -> tuple[list[Message], list[Message], int]:
    """Takes the conversation of a column apart: what was before its last assistant turn, the turn, how many are after.

    A turn is all that the assistant does between two messages of others: its tool calls, their results and its answer.
    """
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise FeedbackRowError(place, f"{name!r} must hold a message of the assistant, which is rated, found none.")
    end = len(roles) - roles[::-1].index("assistant")
    first = end
    while first and roles[first - 1] in ("assistant", "tool"):
        first -= 1
    first = roles.index("assistant", first)
    return messages[:first], messages[first:end], len(messages) - end


def check_size(parts: list[Any], place: str) -> None:
    """Refuses a row, given as all that the chat template reads, that would stall the start or is no Unicode text."""
    if len(parts) > MAX_ROW_MESSAGES:
        found = f"expected at most {MAX_ROW_MESSAGES} messages in a row, found {len(parts)}."
        raise FeedbackRowError(place, found, "Shorten the row.")
    texts: list[str] = []
    try:
        for part in parts:
            if len(part) == 2 and "role" in part and isinstance(part.get("content"), str):
                texts.append(part["content"])
            else:
                add_texts(part, texts, 1)
        text = "".join(texts)
        if not text.isascii():
            text.encode()
        if "\x00" in text:
            raise ValueError("text, found a NUL character")
    except UnicodeEncodeError:
        raise FeedbackRowError(place, "expected Unicode text, found half of a surrogate pair.") from None
    except ValueError as error:
        raise FeedbackRowError(place, f"expected {error}.", "Remove or mend the row.") from error
    if len(text) > MAX_ROW_CHARACTERS:
        found = f"expected at most {MAX_ROW_CHARACTERS:,} characters in a row, found {len(text):,}."
        raise FeedbackRowError(place, found, "Shorten or remove the row.")


def words_of(messages: Sequence[Message]) -> str:
    """The words of messages, one message after the other."""
    calls = (message.get("tool_calls") for message in messages)
    called = (json.dumps(call, ensure_ascii=False) if call else "" for call in calls)
    both = zip((message["content"] for message in messages), called, strict=True)
    return "\n".join(filter(None, chain.from_iterable(both)))


def said_in(prompt: str) -> str:
    """The words of a prompt that is stored as JSON of its messages."""
    return words_of(json.loads(prompt))


def printable(text: str) -> str:
    """A text whose control characters, line breaks apart, are replaced."""
    return "".join(character if character.isprintable() or character == "\n" else "\ufffd" for character in text)


def _message(message: Any, number: int, name: str, place: str) -> Message:
    said, role = message, None
    if isinstance(message, dict):
        if "role" not in message and "from" in message:
            message = {"role": message["from"], "content": message.get("value")}
        plain = len(message) == 2 and isinstance(message.get("content"), str)
        said = message if plain else _with_text(without_nulls(message), f"message {number} of {name!r}", place)
        role = _ROLE_OF.get(role) if isinstance(role := said.get("role"), str) else None
    if role is None or not isinstance(said.get("content"), str):
        expected = f"must have a text 'content' and a 'role' out of {', '.join(ROLES)}."
        raise FeedbackRowError(place, f"message {number} of {name!r} {expected}")
    if not said["content"].strip() and role not in _MAY_BE_EMPTY and not said.get("tool_calls"):
        found = f"{name!r} must hold text, found nothing but white space."
        raise FeedbackRowError(place, found, "Remove or complete the row.")
    return {**said, "role": role}


def _with_text(message: Message, where: str, place: str) -> Message:
    """The message with one text as its content, and with checked tool calls."""
    if isinstance(message.get("content"), list):
        message["content"] = "".join(_text_of(part, where, place) for part in message["content"])
    if "tool_calls" not in message:
        return message
    calls = message.pop("tool_calls")
    if not isinstance(calls, list) or not all(isinstance(_function_of(call).get("name"), str) for call in calls):
        raise FeedbackRowError(place, f"{where} must have a list of function calls as 'tool_calls'.")
    if calls and message.get("role") != "assistant":
        raise FeedbackRowError(place, f"{where} must be the assistant's, as it has 'tool_calls'.")
    return {"content": "", **message, "tool_calls": list(map(_with_object, calls))} if calls else message


def _text_of(part: Any, where: str, place: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
        return str(part["text"])
    found = f"one of type {shown(kind)}" if isinstance(kind, str) else shown(part)
    raise FeedbackRowError(place, f"{where} must have text parts as its content, found {found}.", "Remove the row.")


def _function_of(call: Any) -> Message:
    function = call.get("function", call) if isinstance(call, dict) else None
    return function if isinstance(function, dict) else {}


def _with_object(call: Message) -> Message:
    """The call with its arguments as an object, as chat templates want them; logs of the API have them as JSON text."""
    function = dict(_function_of(call))
    arguments = function.get("arguments")
    if isinstance(arguments, str) and isinstance(known := unpacked(arguments.strip()), dict):
        function["arguments"] = known  # else it is the model's own mistake, which is shown as it was
    return {**call, "function": function} if "function" in call else function
