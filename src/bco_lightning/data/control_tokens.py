"""Keep what users typed apart from control tokens: their ``<|im_end|>`` is text, the template's is markup.

Before the chat template is asked, each name of a control token in what it is told gives way to a mark, and so does a
part of a name at the edge of a text, which its surroundings might complete. Afterwards what stands between two control
tokens of the template's own is tokenized as if there were no control tokens, with what was typed in its place again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from tokenizers import Tokenizer

from bco_lightning.batch import Message
from bco_lightning.data.values import add_texts

# Unicode noncharacters, which no text should hold; where one does, it is itself put behind a mark.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
_MARK = re.compile(f"{OPEN}([0-9]+){CLOSE}")
# Names that stand so near to each other in what was said share a mark, so that a row full of them stays cheap.
_NEAR = 64
_ESCAPED_MARK = re.compile(r"\\ufdd[01]", re.IGNORECASE)


class CannotBeTextError(Exception):
    """The name of a control token stands in a text, and template or tokenizer have no way to leave it text."""


@dataclass
class Conversation:
    """What the chat template is told; a mark may stand for a text that would be taken for a control token."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    literals: list[str] = field(default_factory=list)  # the texts behind the marks

    def texts(self) -> list[str]:
        """Every text that the template is told."""
        found: list[str] = []
        for part in (*self.messages, *(self.tools or ()), dict(self.options)):
            add_texts(part, found, 1)
        return found

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


class ControlTokens:
    """The special tokens of a tokenizer, and how to write their names as ordinary text."""

    def __init__(self, tokenizer: Any) -> None:
        added = {number: token for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        names = {token.content for token in added.values()} | set(tokenizer.all_special_tokens)
        by_length = sorted(filter(None, names), key=len, reverse=True)
        self.ids = frozenset(added) | frozenset(tokenizer.all_special_ids)
        self._tokenizer, self._unknown = tokenizer, (tokenizer.unk_token_id, tokenizer.unk_token)
        self._plain_tokenizer = cache(self._without_special_tokens)
        self._typed = re.compile("|".join([*map(re.escape, by_length), f"[{OPEN}{CLOSE}]"]))
        # Looking for letters is many times faster than looking for names, and most texts hold none of these.
        self._initials = "".join({name[0] for name in by_length} | {OPEN, CLOSE})
        self._finals = "".join({name[-1] for name in by_length})
        self._heads = {name[:length] for name in names for length in range(1, len(name))}
        self._tails = {name[length:] for name in names for length in range(1, len(name))}
        self._longest = len(by_length[0]) if by_length else 0
        # A normalizer can turn other letters, such as full-width ones, into the name of a token.
        self._normalized = (
            tokenizer.is_fast
            and tokenizer.backend_tokenizer.normalizer is not None
            and any(token.normalized for token in added.values())
        )

    def shield(self, conversation: Conversation) -> Conversation:
        """Puts marks into the texts; gives the same conversation back if they hold no name and no part of one."""
        if not self._normalized and not any(self._is_suspect(text) for text in conversation.texts()):
            return conversation
        literals: list[str] = []
        marked = conversation.mapped(
            content=lambda text: self._mark(text, literals, _NEAR, edges=self._normalized),
            other=lambda text: self._mark(text, literals),
        )
        return replace(marked, literals=literals) if literals else conversation

    def encode(self, text: str, conversation: Conversation) -> list[int]:
        """Token ids of a rendered text with marks: control tokens for its own, ordinary tokens for what was typed.

        Raises:
            CannotBeTextError: If the template takes a mark apart, or the tokenizer has one token for the name, whoever
                writes it.
        """
        bare = _MARK.sub("", text)
        if OPEN in bare or CLOSE in bare or _ESCAPED_MARK.search(bare) or not self._tokenizer.is_fast:
            raise CannotBeTextError
        token_ids: list[int] = []
        section: list[int] = []
        start = 0
        for token, begin, end, is_control in self._tokens(text):
            if is_control:
                token_ids += [*self._section(text[start:begin], start, section, conversation), token]
                start, section = end, []
            else:
                section.append(token)
        return token_ids + self._section(text[start:], start, section, conversation)

    def _tokens(self, text: str) -> Iterator[tuple[int, int, int, bool]]:
        """Tokens of a text, where they begin and end in it, and whether they are control tokens."""
        encoding, unknown = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True), self._unknown
        for token, (begin, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
            # The token for what is unknown is special too, and stands for text wherever that is not its own name.
            yield token, begin, end, token in self.ids and (token != unknown[0] or text[begin:end] == unknown[1])

    def _section(self, text: str, start: int, token_ids: list[int], conversation: Conversation) -> list[int]:
        """Tokens of the text between two control tokens; ``token_ids`` if nothing in it is marked."""
        if OPEN not in text:
            return token_ids
        tokenizer = self._plain_tokenizer(start > 0)
        text = _MARK.sub(lambda mark: conversation.literals[int(mark[1])], text)
        typed: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        if self.ids.difference(self._unknown[:1]).intersection(typed):
            raise CannotBeTextError
        return typed

    def _without_special_tokens(self, inner: bool) -> Tokenizer:
        """The tokenizer as if it had no special tokens; ``inner`` for what is not the beginning of a text."""
        description = self._tokenizer.backend_tokenizer.to_str()
        if inner:  # where some tokenizers would put a space
            description = description.replace('"prepend_scheme":"first"', '"prepend_scheme":"never"')
        other = Tokenizer.from_str(description)
        other.encode_special_tokens = True
        other.no_truncation()
        other.no_padding()
        return other

    def _mark(self, text: str, literals: list[str], near: int = 0, *, edges: bool = False) -> str:
        spans: list[tuple[int, int]] = []
        for begin, end in sorted(self._spans(text, edges)):
            if spans and begin <= spans[-1][1] + near:
                spans[-1] = spans[-1][0], max(spans[-1][1], end)
            else:
                spans.append((begin, end))
        pieces, start = [], 0
        for begin, end in spans:
            pieces += [text[start:begin], f"{OPEN}{len(literals)}{CLOSE}"]
            literals.append(text[begin:end])
            start = end
        return "".join([*pieces, text[start:]])

    def _spans(self, text: str, edges: bool) -> Iterator[tuple[int, int]]:
        """Where names stand, and what might become part of one; with ``edges``, the first and the last letter may."""
        for match in self._typed.finditer(text):
            yield match.span()
        if self._normalized:
            yield from ((begin, end) for _, begin, end, is_control in self._tokens(text) if is_control)
        spoken = text.strip()  # many templates strip, too
        first = len(text) - len(text.lstrip())
        sizes = range(min(self._longest, len(spoken)), 0, -1)
        tail = next((size for size in sizes if spoken[:size] in self._tails), 0)
        head = next((size for size in sizes if spoken[-size:] in self._heads), 0)
        tail, head = (max(tail, 1), max(head, 1)) if edges and spoken else (tail, head)
        if tail:
            yield first, first + tail
        if head:
            yield first + len(spoken) - head, first + len(spoken)

    def _is_suspect(self, text: str) -> bool:
        """Whether a closer look is worth it."""
        return _holds(text, self._initials) or _holds(text.lstrip()[: self._longest], self._finals)


def _holds(text: str, letters: str) -> bool:
    for letter in letters:  # noqa: SIM110 - any() takes twice as long, and this runs for every text
        if letter in text:
            return True
    return False


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_texts(key, change): _map_texts(part, change) for key, part in value.items()}
    return [_map_texts(part, change) for part in value] if isinstance(value, (list, tuple)) else value
