"""Where one rendered text ends and the next goes on: token ids as they stand in the whole, and nothing in between."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, chain, pairwise, product
from typing import Any

from bco_lightning.data.control_tokens import CLOSE

Encode = Callable[[str], list[int]]
Piece = tuple[str, str]  # what a text is to be tokenized after, if that matters, and the text

# What stands before a text that would merge with what truly does, and texts to try a tokenizer with.
_NEUTRAL, _TRIED = (".", "\n", "0", "a"), ("a", "A", "1", ".", "é", "中")
_END = 64  # letters; no control token has a longer name


class NoEdgeError(Exception):
    """A token spans the end of one text and the beginning of the next, and there is no way to write them apart."""


class Joints:
    """How texts go on.

    Most SentencePiece tokenizers put a space before a text, and WordPiece has pieces of its own for what is inside a
    word. Where a tokenizer does such a thing, a text is tokenized after the end of the one before it, whose tokens are
    taken off again.
    """

    def __init__(self, tokenizer: Any, encode: Encode) -> None:
        self._tokenizer, self._encode, self._unknown = tokenizer, encode, tokenizer.unk_token_id
        model = tokenizer.backend_tokenizer.model if tokenizer.is_fast else None
        self._inner_pieces = bool(getattr(model, "continuing_subword_prefix", None))
        added = tokenizer.added_tokens_decoder.values()
        self._names = tuple(sorted((token.content for token in added), key=len, reverse=True))
        self._strips = any(token.lstrip or token.rstrip for token in added)
        tried = ((self._after(end, text, encode), encode(text)) for end, text in product(_NEUTRAL, _TRIED))
        self._matter = any(after not in (None, beginning) for after, beginning in tried)

    def pieces(self, texts: Sequence[str]) -> list[Piece]:
        """Texts of which each goes on where the one before ends."""
        if not self._matter:
            return [("", text) for text in texts]
        before = accumulate(texts[:-1], lambda end, text: (end + text[-_END:])[-_END:], initial="")
        return [(self._deciding(end), text) for end, text in zip(before, texts, strict=True)]

    def token_ids(self, piece: Piece, encode: Encode) -> list[int]:
        """Token ids of a text that goes on, by a function that gives those of one that begins."""
        end, text = piece
        if not end:
            return encode(text)
        for before in (end, *(() if self._inner_pieces else _NEUTRAL)):
            if (token_ids := self._after(before, text, encode)) is not None:
                return token_ids
        raise NoEdgeError

    def hold(self, texts: Sequence[str], token_ids: Sequence[list[int]]) -> bool:
        """Whether the token ids of texts that go on, one after the other, read as those of the whole text do."""
        for end, text in pairwise(texts):
            # Spaces that meet, and a letter and its accent, may become one.
            first = text[:1] or "a"
            if (first.isspace() and (self._strips or end[-1:].isspace())) or unicodedata.combining(first):
                return True
        return self._read(chain.from_iterable(token_ids)) == self._read(self._encode("".join(texts)))

    def _deciding(self, end: str) -> str:
        """The end of a text that decides how the next one begins: a control token, a letter, or the last word."""
        spoken = end.rstrip()
        if self._inner_pieces:
            return end[len(spoken) - len("".join(spoken.split()[-1:])) :]
        if spoken.endswith(self._names):
            return end[len(spoken) - len(next(filter(spoken.endswith, self._names))) :]
        return _NEUTRAL[0] if end.endswith(CLOSE) else end[-1:]

    def _after(self, end: str, text: str, encode: Encode) -> list[int] | None:
        """Token ids of a text after another; none if one token spans both."""
        before, both = encode(end), encode(end + text)
        # Some tokenizers write what is unknown as one token with what follows, if that is unknown too.
        is_known = self._inner_pieces or before[-1:] != [self._unknown]
        return both[len(before) :] if is_known and both[: len(before)] == before else None

    def _read(self, token_ids: Iterable[int]) -> str:
        known = [token for token in token_ids if token != self._unknown]
        return unicodedata.normalize("NFKC", self._tokenizer.decode(known, clean_up_tokenization_spaces=False))
