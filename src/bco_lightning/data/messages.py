"""Chat messages, checked and brought to one form."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

from bco_lightning.batch import Message
from bco_lightning.data.images import IMAGES, MARK, PARTS, source_in
from bco_lightning.data.values import add_texts, keys_of, objects_in, shown, unpacked, without_nulls
from bco_lightning.errors import FeedbackRowError

# Limits of a row, so that a single one cannot stall the start: about 250,000 tokens of English, and some 0.2 seconds of
# chat template, which is rendered once for each message of a completion.
MAX_ROW_CHARACTERS = 1_000_000
MAX_ROW_MESSAGES = 500

ROLES = ("system", "user", "assistant", "tool")
# Beside OpenAI's names of now, its others, and those of ShareGPT ({"from": "human", "value": ...}), Gemini and Llama 3.
_ROLE_OF = {
    **{role: role for role in ROLES}, "developer": "system", "human": "user", "gpt": "assistant", "model": "assistant",
    "ai": "assistant", "bot": "assistant", "chatbot": "assistant", "prompter": "user", "function": "tool",
    "observation": "tool", "ipython": "tool", "tool_response": "tool", "function_response": "tool",
}  # fmt: skip
_CALLS = ("function_call", "tool_call")  # ShareGPT's name for the assistant where it says the JSON of a function call
_TEXT_PARTS = ("text", "input_text", "output_text", None)
# Messages that were meant to be written as JSON: cut off, or as Python prints them.
_LIKE_MESSAGES = re.compile(
    rf"""\s*\[\s*\{{(?=.*['"](?:role|from)['"]\s*:\s*['"](?:{"|".join(_ROLE_OF)})['"])""", re.DOTALL
)
# Transcripts as Anthropic wrote them, and as NVIDIA does, where what comes before the first mark is the user's.
_SPEAKERS = re.compile(r"\n\n(Human|Assistant): ?")
_STEERED, _STEERED_SPEAKERS = "\n<extra_id_1>Assistant\n", re.compile(r"\n<extra_id_1>(User|Assistant)\n")
_MAY_BE_EMPTY = ("system", "tool")


def messages_in(value: Any, name: str, place: str, role: str = "") -> list[Message]:
    """The messages of a column in OpenAI's layout or ShareGPT's, or a text that ``role`` says.

    Each gets a role out of ``ROLES`` and a text as content; other keys, such as ``tool_calls`` and
    ``reasoning_content``, are left for the chat template. Keys without a value, with which a Parquet file fills up, are
    gone; the arguments of a tool call are an object where they were the JSON text of one.
    """
    value = [value] if _is_message(value) else value
    if role and isinstance(value, str):
        value = [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        form = "text or a list of chat messages" if role else "a list of chat messages"
        found = f"a value of type {type(value).__name__}" if value else "an empty list"
        found = "nothing (null)" if value is None else found
        raise FeedbackRowError(place, f"{name!r} must be {form}, found {found}.")
    return [_message(message, number, name, place) for number, message in enumerate(value, 1)]


def out_of_text(value: Any, name: str, place: str) -> Any:
    """The messages of a text that holds them as JSON, as a CSV has them, or a transcript; anything else as it is."""
    if not isinstance(value, str):
        return value
    if value.startswith("\n\nHuman:") or _STEERED in value:
        return _turns_of(value)
    if not value.lstrip().startswith(("[", "{")):
        return value
    found = unpacked(value.strip())
    messages = [unpacked(part) for part in found] if isinstance(found, list) else [found]
    if messages and all(map(_is_message, messages)):
        return messages
    if found == value.strip() and _LIKE_MESSAGES.match(value):
        problem = f"{name!r} must hold messages as JSON, found them cut off or written in another way."
        raise FeedbackRowError(place, problem, "Write them by json.dumps, and whole.")
    return value


def _turns_of(text: str) -> list[Message]:
    """The turns of a transcript of HH-RLHF or HelpSteer2; the last is none if it only asks for an answer."""
    parts = _SPEAKERS.split(text) if text.startswith("\n\nHuman:") else ["", "User", *_STEERED_SPEAKERS.split(text)]
    turns = [{"role": who.lower(), "content": said} for who, said in zip(parts[1::2], parts[2::2], strict=True)]
    return turns if turns[-1]["role"] != "assistant" or turns[-1]["content"].strip() else turns[:-1]


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
    return "\n".join(filter(None, chain.from_iterable(both))).replace(MARK, "[image]")


def said_in(prompt: str) -> str:
    """The words of a prompt that is stored as JSON of its messages."""
    return words_of(json.loads(prompt))


def _is_message(value: Any) -> bool:
    """Whether something is an object that somebody says something in, whatever the role is called."""
    if not isinstance(value, dict):
        return False
    speaker = value.get("role", value.get("from"))
    return isinstance(speaker, str) and not value.keys().isdisjoint(("content", "value", "tool_calls", "parts"))


def _message(message: Any, number: int, name: str, place: str) -> Message:
    def error(found: str) -> FeedbackRowError:
        return FeedbackRowError(place, f"message {number} of {name!r} must {found}.")

    if isinstance(message, str):  # as `datasets` stores a list of its Json()
        message = unpacked(message)
    if not isinstance(message, dict):
        raise error(f"be an object with 'role' and 'content', found {shown(message)}")
    if "role" not in message and "from" in message:
        message = {"role": message["from"], "content": message.get("value")}
    given = message.get("role")
    role = _ROLE_OF.get(given) or _ROLE_OF.get(given.lower()) if isinstance(given, str) else None
    if role is None:
        if given not in _CALLS:
            found = shown(given) if "role" in message else f"the keys {keys_of(message)}"
            raise error(f"have a 'role' out of {', '.join(ROLES)}, or what others call these, found {found}")
        calls = unpacked(message.get("content"))
        calls = calls if isinstance(calls, list) else [calls]
        role, message = "assistant", {**message, "content": None, "tool_calls": calls}
    said, content = message, message.get("content")
    if len(message) > 2 or not isinstance(content, str) or content.startswith("[{"):
        said = _with_text(without_nulls(message), role, f"message {number} of {name!r}", place)
    if not isinstance(said.get("content"), str):
        raise error(f"have a text 'content', found {shown(said['content']) if 'content' in said else 'none'}")
    if not said["content"].strip() and role not in _MAY_BE_EMPTY and not said.get("tool_calls"):
        found = f"{name!r} must hold text, found nothing but white space."
        raise FeedbackRowError(place, found, "Remove or complete the row.")
    return {**said, "role": role}


def _with_text(message: Message, role: str, where: str, place: str) -> Message:
    """The message with one text as its content, and with checked tool calls."""
    if "parts" in message and "content" not in message:
        message["content"] = message.pop("parts")  # Gemini's
    content = message.get("content")
    parts = unpacked(content)
    if isinstance(content, str) and isinstance(parts, list):  # or the text of a list that is none of parts
        are_parts = all(isinstance(p, dict) and (p.keys() == {"type", "text"} or p.get("type") in PARTS) for p in parts)
        content = parts if are_parts else content
    if isinstance(content, (dict, list)):
        parts = content if isinstance(content, list) else [content]
        typed = all(isinstance(part, str) or (isinstance(part, dict) and "type" in part) for part in parts)
        if role == "tool" and not typed:
            content = json.dumps(content, ensure_ascii=False)  # what a function gave
        else:
            content = "".join(_text_of(part, where, place) for part in parts)
            images = [source_in(part) for part in objects_in(parts) if part.get("type") in PARTS]
            message |= {IMAGES: images} if images else {}
    if content is not None:
        message["content"] = content
    if "function_call" in message and "tool_calls" not in message:
        message["tool_calls"] = [unpacked(message.pop("function_call"))]  # OpenAI's before there were several
    if "tool_calls" not in message:
        return message
    calls = unpacked(message.pop("tool_calls"))
    calls = [unpacked(call) for call in calls] if isinstance(calls, list) else calls
    if not isinstance(calls, list) or not all(isinstance(_function_of(call).get("name"), str) for call in calls):
        raise FeedbackRowError(place, f"{where} must have a list of function calls as 'tool_calls'.")
    if calls and role != "assistant":
        raise FeedbackRowError(place, f"{where} must be the assistant's, as it has 'tool_calls'.")
    return {"content": "", **message, "tool_calls": list(map(_with_object, calls))} if calls else message


def _text_of(part: Any, where: str, place: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else ""
    if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
        return str(part["text"])
    if isinstance(kind, str) and kind in PARTS:
        return MARK
    found = f"one of type {shown(kind)}" if kind and isinstance(kind, str) else shown(part)
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
