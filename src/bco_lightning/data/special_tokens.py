"""Keep what users typed apart from control tokens: their ``<|im_end|>`` is text, the template's is markup."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bco_lightning.batch import Message

# Unicode noncharacters, which no text should hold; where one does, it is itself put behind a mark.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_MARK = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")


@dataclass(frozen=True)
class ShieldedMessages:
    """Messages in which a mark stands for each text that the tokenizer would take for a control token.

    Args:
        messages: With marks.
        literals: The texts behind them.
    """

    messages: list[Message]
    literals: list[str]

    def restore(self, text: str) -> str:
        """``text`` with what was typed in the place of the marks."""
        return _MARK.sub(lambda mark: self.literals[int(mark[1])], text)


class SpecialTokens:
    """The special tokens of a tokenizer, and how to write their names as ordinary text.

    Args:
        tokenizer: A transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        added = {number: token for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        names = {token.content for token in added.values()} | set(tokenizer.all_special_tokens)
        self.ids = frozenset(added) | frozenset(tokenizer.all_special_ids)
        self._tokenizer = tokenizer
        by_length = sorted(filter(None, names), key=len, reverse=True)
        self._typed = re.compile("|".join(map(re.escape, [*by_length, _OPEN, _CLOSE])))
        heads = "|".join(_prefixes(re.escape(letter) for letter in name) for name in by_length)
        tails = "|".join(_suffixes([re.escape(letter) for letter in name]) for name in by_length)
        self._torn = re.compile(rf"(?:{heads})\s*\Z|\A\s*(?:{tails})") if by_length else re.compile(r"(?!)")
        # A normalizer can turn other letters, such as full-width ones, into the name of a token.
        self._normalized = (
            tokenizer.is_fast
            and tokenizer.backend_tokenizer.normalizer is not None
            and any(token.normalized for token in added.values())
        )

    def shield(self, messages: list[Message]) -> ShieldedMessages | None:
        """Marks each name of a special token in the texts of ``messages``; ``None`` if there is none."""
        literals: list[str] = []
        marked = _map_texts(messages, lambda text: self._mark(text, literals))
        return ShieldedMessages(marked, literals) if literals else None

    def shield_whole(self, messages: list[Message]) -> ShieldedMessages:
        """Marks each content from its first letter to its last."""
        literals: list[str] = []

        def mark(text: str) -> str:
            literals.append(text.strip())
            start = text.index(literals[-1])
            return f"{text[:start]}{_marked(len(literals) - 1)}{text[start + len(literals[-1]) :]}"

        return ShieldedMessages([{**message, "content": mark(message["content"])} for message in messages], literals)

    def may_join(self, messages: list[Message]) -> bool:
        """Whether a content begins or ends with a part of a name, which its surroundings might complete."""
        return self._normalized or any(self._torn.search(message["content"]) for message in messages)

    def count(self, text: str) -> int:
        """Number of control tokens in ``text``."""
        return len(self._spans(text))

    def encode(self, text: str, shielded: ShieldedMessages) -> list[int]:
        """Token ids of a rendered text with marks: its own control tokens, and as ordinary tokens what was typed.

        Between two control tokens the text is tokenized as a whole, as it would be without the special tokens.

        Args:
            text: What the chat template made of ``shielded.messages``, or a part of it.
            shielded: The literals behind the marks.

        Returns:
            Token ids.

        Raises:
            ValueError: If the tokenizer cannot write the name of a special token as ordinary text.
        """
        if not _MARK.search(text):
            return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        if not self._tokenizer.is_fast:
            raise ValueError("the name of a special token, which needs a fast tokenizer to be read as text")
        token_ids: list[int] = []
        start = 0
        for begin, end, special, section_ids in [*self._sections(text), (len(text), len(text), [], [])]:
            token_ids += section_ids if not special else []
        return token_ids if start else self._joined(text, shielded)

    def _joined(self, text: str, shielded: ShieldedMessages) -> list[int]:
        raise NotImplementedError
