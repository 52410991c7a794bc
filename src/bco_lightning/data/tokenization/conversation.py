"""What a chat template is told, and the marks that stand in it for texts to be kept apart from markup."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from bco_lightning.batch import Message

# Unicode noncharacters, which no text should hold; where one does, it is itself put behind a mark.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
MARK = re.compile(f"{OPEN}([0-9]+){CLOSE}")


@dataclass
class Conversation:
    """What the chat template is told; a mark may stand for a text that would be taken for a control token.

    Args:
        messages: Prompt and completion.
        tools: JSON schemas of the functions that the assistant could call.
        options: What else the template is told, by name.
        literals: The texts behind the marks.

    Attributes:
        is_plain: Whether each message is a role and a text, and the template is told nothing else.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    literals: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.is_plain = self.tools is None and not self.options and all(map(_is_plain, self.messages))

    def texts(self) -> list[str]:
        """Every text that the template is told."""
        if self.is_plain:
            return [text for message in self.messages for text in message.values()]
        return [*_texts_in(self.messages), *_texts_in(self.tools), *_texts_in(self.options)]

    def restore(self, text: str) -> str:
        """``text`` with what was typed in the place of the marks."""
        return MARK.sub(lambda mark: self.literals[int(mark[1])], text)

    def mapped(self, content: Callable[[str], str], other: Callable[[str], str]) -> Conversation:
        """The conversation with what was said changed by one function, and every other text by another."""

        def change(message: Message) -> Message:
            # Templates print what a tool gave back as they print the calls.
            said = other if message.get("role") == "tool" else content
            return {
                other(name): _map_texts(part, said if name == "content" else other) for name, part in message.items()
            }

        options = {name: _map_texts(value, other) for name, value in self.options.items()}
        return Conversation([change(message) for message in self.messages], _map_texts(self.tools, other), options)


def put_behind(text: str, literals: list[str]) -> str:
    """A mark that stands for ``text``, which is added to ``literals``."""
    literals.append(text)
    return f"{OPEN}{len(literals) - 1}{CLOSE}"


def _is_plain(message: Message) -> bool:
    return len(message) == 2 and type(message.get("role")) is str and type(message.get("content")) is str


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _texts_in(key)
            yield from _texts_in(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _texts_in(part)


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_texts(key, change): _map_texts(part, change) for key, part in value.items()}
    return [_map_texts(part, change) for part in value] if isinstance(value, (list, tuple)) else value
