"""Look up the tokens of words instead of computing them again, with the library's own ids, several times as fast."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

# White space that is no space and controls, of which patterns think differently; the library sees to such texts.
_DOUBTFUL = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\xa0\u1680\u180e\u2000-\u200f\u2028-\u202f\u205f-\u206f\u3000\ud800-\udfff\ufeff]"
)
# Stand, in what is cut at spaces, for a space behind white space, where nothing is cut, and for the start of a text.
_SPACE, _START = "\x01", "\x02"
# What the words kept may amount to, so that a log of endless new words does not fill the memory.
_MOST_CHARACTERS = 2**22
# One text of a batch is tokenized twice, which pays off if there are others.
_FEWEST_TEXTS = 16
# The parts of which patterns of well-known tokenizers consist. None of them takes a space behind anything but white
# space, and none looks back or further ahead, so a word means the same wherever it stands; others may be added by that.
_LETTERS = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_PARTS = (
    *("'s|'t|'re|'ve|'m|'ll|'d", _ENDINGS, r" ?\p{L}+", r" ?\p{N}+", r"\p{N}", r"\p{N}{1,3}"),
    *(r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", rf"{_LETTERS}\p{{L}}+"),
    *(f"{_LETTERS}{_UPPER}{upper}{_LOWER}{lower}{end}"
      for upper, lower in ("*+", "+*") for end in (f"{_ENDINGS}?", "")),
    *(r"\s*[\r\n]+", r"\s*[\r\n]", r"\s+(?!\S)"),
)  # fmt: skip
_KNOWN_PATTERN = re.compile("(?:(?:{})\\|)+{}".format("|".join(map(re.escape, _PARTS)), re.escape(r"\s+")))
_PROBE = (
    "I'm sure you'LL say we're 12345 or 1,234.56e-7?! don't... 'tis O'Neill's _x_ \n\n  def f(a, b):\n\treturn a  +  b"
    "\r\n\r\n   end;   \n \n\t \t{}[]<|><||>``` http://a.b/c?d=e&f#g // /* */\n/\n  A1b2 3 C-3PO "
    "naïve “Ünï” 你好 🙂 e\u0301 "
)


class WordTokens:
    """Token ids by word, for tokenizers of which each word stands for itself.

    A text is cut before each space that follows something else, and what the library makes of such a word is kept.

    Args:
        backend: A tokenizer of the ``tokenizers`` library, without truncation and padding.
        name: What to call it in a warning.
    """

    def __init__(self, backend: Any, name: str) -> None:
        self._backend, self._name = backend, name
        self._known: dict[str, tuple[int, ...]] = {}
        self._num_characters = 0
        self._trusted = True

    @classmethod
    def of(cls, backend: Any, name: str) -> WordTokens | None:
        """The words of a tokenizer.

        Returns:
            ``None`` if its words may depend on what is around them: its parts are not among the ones known not to do
            so, or it does not tokenize a text full of odd cases as its words.
        """
        if not (_has_known_parts(backend) and _has_plain_added_tokens(backend)):
            return None
        words = cls(backend, name)
        names = [token.content for token in backend.get_added_tokens_decoder().values()]
        texts = [
            _PROBE,
            _PROBE[::-1],
            " ".join(names),
            "".join(names),
            *(f"a{name}b {name} \n {name}" for name in names),
        ]
        return words if words._looked_up(texts) == words._by_library(texts) else None

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts, without what the tokenizer would put around them.

        One text is tokenized by the library as well. If the two differ, a warning is given, and this batch and all
        later ones are the library's.
        """
        plain = [text for text in texts if not _DOUBTFUL.search(text)] if self._trusted else []
        if len(plain) < _FEWEST_TEXTS:
            return self._by_library(texts)
        found = dict(zip(plain, self._looked_up(plain), strict=True))
        sample = max(plain, key=len)
        others = [sample, *(text for text in texts if text not in found)]
        made = self._by_library(others)
        if found[sample] != made[0]:
            self._trusted = False
            rank_zero_warn(f"{self._name} does not tokenize texts word by word; reading goes on without that, slower.")
            return self._by_library(texts)
        found.update(zip(others, made, strict=True))
        return [found[text] for text in texts]

    def _by_library(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _looked_up(self, texts: Sequence[str]) -> list[list[int]]:
        divided = [_words(text) for text in texts]
        known = self._with(set().union(*divided))
        token_ids = []
        for words in divided:
            ids: list[int] = []
            for word in words:
                ids += known[word]
            token_ids.append(ids)
        return token_ids

    def _with(self, words: set[str]) -> dict[str, tuple[int, ...]]:
        """The dictionary, all of ``words`` in it; threads may share it, as entries are only ever added."""
        known = self._known
        new = list(words.difference(known))
        if not new:
            return known
        found = dict(zip(new, map(tuple, self._by_library([_written(word) for word in new])), strict=True))
        self._num_characters += sum(map(len, new))
        if self._num_characters > _MOST_CHARACTERS:
            # A new one begins, and who holds the old one keeps it until done.
            known = self._known = {word: known[word] for word in words.intersection(known)}
            self._num_characters = sum(map(len, words))
        known.update(found)
        return known


def _words(text: str) -> list[str]:
    if "  " in text:
        text = text.replace("  ", " " + _SPACE).replace(_SPACE + " ", _SPACE * 2)
    for white in "\n\t\r":
        if white in text:
            text = text.replace(white + " ", white + _SPACE)
    return (_START + text).split(" ")


def _written(word: str) -> str:
    """What a word looks like in the text, with the space that it was cut at."""
    return (" " + word.replace(_SPACE, " ")).removeprefix(" " + _START)


def _has_known_parts(backend: Any) -> bool:
    if not hasattr(backend.model, "dropout") or backend.model.dropout:  # only BPE has that
        return False
    normalizer = _description(backend.normalizer)
    if normalizer and normalizer["type"] != "NFC":
        return False
    whole = _description(backend.pre_tokenizer)
    parts = whole.get("pretokenizers", [whole])
    if parts and parts[0].get("type") == "Digits":
        parts = parts[1:]
    return _cuts_at_spaces(parts)


def _cuts_at_spaces(parts: list[dict[str, Any]]) -> bool:
    if not parts or parts[-1].get("type") != "ByteLevel" or parts[-1]["add_prefix_space"]:
        return False
    if len(parts) == 1:
        return bool(parts[-1]["use_regex"])
    first = parts[0]
    return (
        len(parts) == 2
        and first["type"] == "Split"
        and (first["behavior"], first["invert"]) == ("Isolated", False)
        and _KNOWN_PATTERN.fullmatch(first["pattern"].get("Regex", "")) is not None
    )


def _has_plain_added_tokens(backend: Any) -> bool:
    return not any(
        token.lstrip or token.rstrip or token.single_word or " " in token.content or _DOUBTFUL.search(token.content)
        for token in backend.get_added_tokens_decoder().values()
    )


def _description(part: Any) -> dict[str, Any]:
    return json.loads(part.__getstate__()) if part is not None else {}
