"""Keep what users typed apart from control tokens: their ``<|im_end|>`` is text, the template's is markup."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cached_property
from typing import Any

from bco_lightning.data.tokenization.conversation import CLOSE, MARK, OPEN, Conversation, put_behind

# Names that stand so near to each other share a mark, so that a row full of them stays cheap.
_NEAR = 32
_ESCAPED_MARK = re.compile(r"\\ufdd[01]", re.IGNORECASE)
# A template may print what is in tools, their calls and their results as JSON; what that escapes is left in sight.
_UNESCAPED = re.compile(r'[^"\\\x00-\x1f]+')
_ANYTHING = re.compile(r"[\s\S]+")


class SpecialTokens:
    """The special tokens of a tokenizer, and how to write their names as ordinary text.

    Args:
        tokenizer: A transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        added = {number: token for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        names = {token.content for token in added.values()} | set(tokenizer.all_special_tokens)
        by_length = sorted(filter(None, names), key=len, reverse=True)
        self.ids = frozenset(added) | frozenset(tokenizer.all_special_ids)
        self._tokenizer = tokenizer
        self._name = re.compile("|".join(map(re.escape, by_length)) or r"(?!)")
        self._typed = re.compile(f"{self._name.pattern}|[{OPEN}{CLOSE}]")
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
        """Marks each name of a special token in the texts; gives the same conversation back if there is none."""
        if not self._normalized and not any(_holds(text, self._initials) for text in conversation.texts()):
            return conversation
        literals: list[str] = []
        marked = conversation.mapped(
            content=lambda text: self._mark(text, literals, _NEAR),
            other=lambda text: self._mark(text, literals, 0),
        )
        return replace(marked, literals=literals) if literals else conversation

    def shield_whole(self, conversation: Conversation) -> Conversation:
        """Marks each content as a whole, from its first letter to its last, and other texts where they may join."""
        literals: list[str] = []

        def hide(text: str, parts: re.Pattern[str]) -> str:
            spoken = text.strip()
            return text.replace(spoken, parts.sub(lambda part: put_behind(part[0], literals), spoken), 1)

        def other(text: str) -> str:
            # Not all of them: a template may ask what a role or the kind of a call is.
            return hide(text, _UNESCAPED) if self._is_torn(text.strip()) else self._mark(text, literals, 0)

        marked = conversation.mapped(content=lambda text: hide(text, _ANYTHING), other=other)
        return replace(marked, literals=literals)

    def may_join(self, conversation: Conversation) -> bool:
        """Whether a text begins or ends with a part of a name, which its surroundings might complete."""
        return self._normalized or any(self._is_torn(text.strip()) for text in conversation.texts())

    def count(self, text: str) -> int:
        """Number of control tokens in a rendered text."""
        return len(self._spans(text, self._name))

    def encode(self, text: str, conversation: Conversation) -> list[int]:
        """Token ids of a rendered text with marks: control tokens for its own, ordinary tokens for what was typed.

        Between two control tokens the text is tokenized as a whole, as if there were no special tokens.

        Args:
            text: What the chat template made of ``conversation``, or a part of it.
            conversation: Holds the literals behind the marks.

        Returns:
            Token ids.

        Raises:
            ValueError: If the tokenizer or the template cannot keep the name of a special token as ordinary text.
        """
        bare = MARK.sub("", text)
        if OPEN in bare or CLOSE in bare or _ESCAPED_MARK.search(bare):
            raise ValueError("found the name of a special token, in a text that the chat template takes apart")
        if not self._tokenizer.is_fast:
            raise ValueError("found the name of a special token, which only a fast tokenizer can read as text")
        encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        token_ids: list[int] = []
        section: list[int] = []
        start = 0
        for token, (begin, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
            if self._is_control(token, text[begin:end]):
                token_ids += [*self._section(text[start:begin], start, section, conversation), token]
                start, section = end, []
            else:
                section.append(token)
        return token_ids + self._section(text[start:], start, section, conversation)

    def _section(self, text: str, start: int, token_ids: list[int], conversation: Conversation) -> list[int]:
        """Tokens of the text between two control tokens; ``token_ids`` if nothing in it is marked."""
        if OPEN not in text:
            return token_ids
        tokenizer = self._inner_tokenizer if start else self._ordinary_tokenizer
        typed: list[int] = tokenizer.encode(conversation.restore(text), add_special_tokens=False).ids
        if self.ids.difference({self._tokenizer.unk_token_id}).intersection(typed):
            raise ValueError("found the name of a special token, which this tokenizer cannot write in any other way")
        return typed

    @cached_property
    def _ordinary_tokenizer(self) -> Any:
        """The tokenizer as if it had no special tokens."""
        return self._without_special_tokens(self._tokenizer.backend_tokenizer.to_str())

    @cached_property
    def _inner_tokenizer(self) -> Any:
        """The same for what is not the beginning of a text, where some tokenizers would put a space."""
        description = self._tokenizer.backend_tokenizer.to_str()
        return self._without_special_tokens(description.replace('"prepend_scheme":"first"', '"prepend_scheme":"never"'))

    def _without_special_tokens(self, description: str) -> Any:
        from tokenizers import Tokenizer

        other = Tokenizer.from_str(description)
        other.encode_special_tokens = True
        other.no_truncation()
        other.no_padding()
        return other

    def _mark(self, text: str, literals: list[str], near: int) -> str:
        spans: list[tuple[int, int]] = []
        for begin, end in self._spans(text, self._typed):
            if spans and begin - spans[-1][1] <= near:
                spans[-1] = (spans[-1][0], max(spans[-1][1], end))
            else:
                spans.append((begin, end))
        pieces = []
        start = 0
        for begin, end in spans:
            pieces += [text[start:begin], put_behind(text[begin:end], literals)]
            start = end
        return "".join([*pieces, text[start:]])

    def _spans(self, text: str, names: re.Pattern[str]) -> list[tuple[int, int]]:
        spans = [match.span() for match in names.finditer(text)]
        if self._normalized:
            encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            pairs = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
            spans += [span for token, span in pairs if self._is_control(token, text[slice(*span)])]
        return sorted(set(spans), key=lambda span: (span[0], -span[1]))

    def _is_control(self, token: int, text: str) -> bool:
        # The token for what is unknown is special too, and stands for text wherever that is not its own name.
        return token in self.ids and (token != self._tokenizer.unk_token_id or text == self._tokenizer.unk_token)

    def _is_torn(self, text: str) -> bool:
        head, tail = text[: self._longest], text[-self._longest :]
        if not (_holds(tail, self._initials) or _holds(head, self._finals)):
            return False
        sizes = range(1, min(self._longest, len(text) + 1))
        return any(text[-size:] in self._heads or text[:size] in self._tails for size in sizes)


def _holds(text: str, letters: str) -> bool:
    for letter in letters:  # noqa: SIM110 - any() takes twice as long, and this runs for every text
        if letter in text:
            return True
    return False
