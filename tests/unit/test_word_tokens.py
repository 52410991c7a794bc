"""Tokens by word: the library's ids to the last one, for every tokenizer and text, or the library itself."""

from __future__ import annotations

import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from bco_lightning.data.tokenization import RowTokenizer, word_tokens
from bco_lightning.data.tokenization.length_limits import LengthLimits
from bco_lightning.data.tokenization.word_tokens import WordTokens
from bco_lightning.models.language_model import load_tokenizer
from bco_lightning.places import resolve_packaged
from tests.conftest import REAL_MODEL

# As the tokenizer.json of each model has them.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace("{1,3}", "")
GPT_4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NAMES = ("<|a|>", "<|a|><|b|>", "|>x", "<|im_end|>", "\n\n", "foo")
WHITE = ("", " ", "\n", "\t", "\r", "\u2028", "\u3000", "\xa0")
CORPUS = [
    json.loads(line)
    for line in Path(resolve_packaged("package:bco_lightning/demo/train.jsonl")).read_text("utf-8").splitlines()
]


def byte_level(use_regex: bool = True, add_prefix_space: bool = False) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=use_regex)


def in_turn(*parts: Any) -> Any:
    return pre_tokenizers.Sequence(list(parts))


def split(pattern: str, behavior: str = "isolated", invert: bool = False) -> Any:
    return in_turn(pre_tokenizers.Split(Regex(pattern), behavior, invert), byte_level(use_regex=False))


def trained(pre_tokenizer: Any, normalizer: Any = None, names: tuple[Any, ...] = NAMES, model: Any = None) -> Any:
    """A small tokenizer that learned its merges from the demo's answers."""
    made = Tokenizer(model or models.BPE())
    made.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        made.normalizer = normalizer
    options = {"vocab_size": 1200, "show_progress": False, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    answers = [row["completion"] for row in CORPUS]
    # White space of all kinds becomes tokens too, so that a cut within it shows.
    white = [f"a{first}{second} {third} b" for first in WHITE for second in WHITE for third in WHITE]
    made.train_from_iterator([*answers, *white * 5], trainers.BpeTrainer(**options))
    made.add_tokens(list(names))
    return made


BACKENDS = {
    "smollm2": load_tokenizer(REAL_MODEL).backend_tokenizer,
    "gpt2": trained(byte_level()),
    "digits": trained(in_turn(pre_tokenizers.Digits(individual_digits=True), byte_level())),
    "llama3": trained(split(LLAMA_3)),
    "qwen2": trained(split(QWEN_2), normalizers.NFC()),
    "gpt4o": trained(split(GPT_4O), names=tuple(AddedToken(name, normalized=False) for name in NAMES)),
}
PIECES = [*NAMES, "<|im_start|>", "<|", "|>", "'s", "'LL", "don't", " ", "  ", "   ", "\n", "\r\n", "\t", " \n "]
PIECES += ["12345", "1.5", "!?", "...", "/\n", "_x", "A", "é", "e\u0301", " \u0301", "’", "🙂", "你好"]
PIECES += [
    "\u3000",
    "\r  \r ",
    "a\r  b",
    "a \u2028  b",
    "\xa0",
    "\x0b",
    "\x00",
    "\x01",
    "\x02",
    " \x01 ",
    "\x02a",
    "\x1c",
    "\x85",
    "\u200b",
    "\u2028",
    "ſ",
    "K",
]
# All but the ideographs, syllables and signs of which there are thousands of one kind.
CODE_POINTS = ((0, 0x3500), (0xA000, 0xAC80), (0xF900, 0x10400), (0x1F000, 0x1FB00), (0xE0000, 0xE0200))
ASCII = "".join(map(chr, range(32, 127))) + "\t\n\r"
texts_of_ascii = st.lists(st.sampled_from(PIECES[:23]) | st.text(ASCII, max_size=8), max_size=12).map("".join)
texts_of_anything = st.lists(st.sampled_from(PIECES) | st.text(max_size=8), max_size=12).map("".join)


def by_library(backend: Any, texts: list[str]) -> list[list[int]]:
    return [backend.encode(text, add_special_tokens=False).ids for text in texts]


@pytest.fixture(scope="module", params=BACKENDS)
def both(request: pytest.FixtureRequest) -> tuple[Any, WordTokens]:
    backend = BACKENDS[request.param]
    words = WordTokens.of(backend, "Known")
    assert words is not None
    return backend, words


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(texts_of_ascii, min_size=1, max_size=4))
def test_words_of_ascii_have_the_ids_that_the_library_gives(both: tuple[Any, WordTokens], texts: list[str]) -> None:
    backend, words = both
    assert words._looked_up(texts) == by_library(backend, texts)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(texts_of_anything, min_size=1, max_size=4))
def test_other_letters_and_controls_have_the_ids_that_the_library_gives(
    both: tuple[Any, WordTokens], texts: list[str]
) -> None:
    backend, words = both
    many = [*texts, *map(str, range(20))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert words.encode_all(many) == by_library(backend, many)
        plain = [text for text in texts if not word_tokens._DOUBTFUL.search(text)]
        assert words._looked_up(plain) == by_library(backend, plain)


def test_a_real_log_has_the_ids_that_the_library_gives(both: tuple[Any, WordTokens]) -> None:
    backend, words = both
    texts = [row[name] for row in CORPUS for name in ("prompt", "completion")]
    assert words._looked_up(texts) == by_library(backend, texts)


def test_every_kind_of_letter_between_spaces_has_the_ids_that_the_library_gives(both: tuple[Any, WordTokens]) -> None:
    backend, words = both
    letters = [chr(code) for start, stop in CODE_POINTS for code in range(start, stop)]
    texts = [f"a{x} {x}b {x}  {x}\n {x} " for x in letters if not word_tokens._DOUBTFUL.search(x)]
    assert len(texts) > 20_000
    assert words._looked_up(texts) == [e.ids for e in backend.encode_batch(texts, add_special_tokens=False)]


UNSUPPORTED = {
    "prefix space": lambda: trained(byte_level(add_prefix_space=True)),
    "no words": lambda: trained(byte_level(use_regex=False)),
    "metaspace": lambda: trained(pre_tokenizers.Metaspace()),
    "white space": lambda: trained(pre_tokenizers.Whitespace()),
    "spaces behind words": lambda: trained(split(r"\p{L}+ ?|\s+")),
    "no white space": lambda: trained(split(r" ?\p{L}+| ?\p{N}+")),
    "looks back": lambda: trained(split(r"(?<=a) ?\p{L}+|\s+")),
    "merged": lambda: trained(split(LLAMA_3, "merged_with_next")),
    "inverted": lambda: trained(split(LLAMA_3, invert=True)),
    "text for a pattern": lambda: trained(in_turn(pre_tokenizers.Split(" ", "isolated"), byte_level(use_regex=False))),
    "lower case": lambda: trained(byte_level(), normalizers.Lowercase()),
    "nfkc": lambda: trained(byte_level(), normalizers.NFKC()),
    "dropout": lambda: trained(byte_level(), model=models.BPE(dropout=0.5)),
    "no pre-tokenizer": lambda: Tokenizer(models.BPE()),
    "unigram": lambda: _with_words(Tokenizer(models.Unigram([("a", -1.0), ("b", -2.0)], 0))),
    "word piece": lambda: _with_words(Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))),  # noqa: S106
    "lstrip": lambda: trained(byte_level(), names=(AddedToken("<x>", lstrip=True),)),
    "rstrip": lambda: trained(byte_level(), names=(AddedToken("<x>", rstrip=True),)),
    "single word": lambda: trained(byte_level(), names=(AddedToken("x", single_word=True),)),
    "a name with a space": lambda: trained(byte_level(), names=("a b",)),
}


def _with_words(made: Any) -> Any:
    made.pre_tokenizer = byte_level()
    return made


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_tokenizer_whose_words_may_depend_on_others_is_left_to_the_library(name: str) -> None:
    assert WordTokens.of(UNSUPPORTED[name](), "Unknown") is None


def test_a_tokenizer_that_fails_the_probe_is_left_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_tokens, "_has_known_parts", lambda _: True)
    assert WordTokens.of(trained(byte_level()), "Fair") is not None
    assert WordTokens.of(trained(byte_level(use_regex=False)), "Unfair") is None
    assert WordTokens.of(trained(split(r"\p{L}+ ?|\s+")), "Unfair") is None


def test_a_wrong_entry_is_noticed_and_the_library_takes_over(tokenizer: Any) -> None:
    rows = RowTokenizer(tokenizer, LengthLimits())
    assert rows._words is not None
    texts = ["The secret word stands in the longest text of all.", "naïve", *map("A short one: {}.".format, range(20))]
    expected = by_library(tokenizer.backend_tokenizer, texts)
    assert rows._encode_all(texts) == expected
    rows._words._known["secret"] = (1, 2)
    with pytest.warns(UserWarning, match=type(tokenizer).__name__) as caught:
        assert rows._encode_all(texts) == expected
    assert len(caught) == 1
    assert "secret" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rows._encode_all(texts) == expected
        others = [f"Another secret of {number}" for number in range(20)]
        assert rows._encode_all(others) == by_library(tokenizer.backend_tokenizer, others)


def test_words_are_kept_up_to_a_limit_and_stay_right_beyond_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_tokens, "_MOST_CHARACTERS", 400)
    backend = BACKENDS["gpt2"]
    words = WordTokens(backend, "Known")
    for start in range(0, 400, 20):
        texts = [f"word {number} and {number * number}" for number in range(start, start + 20)]
        assert words._looked_up(texts) == by_library(backend, texts)
        assert sum(map(len, words._known)) <= 400
    assert "and" in words._known


def test_threads_share_the_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_tokens, "_MOST_CHARACTERS", 20_000)
    backend = BACKENDS["gpt2"]
    words = WordTokens(backend, "Known")
    texts = [f"{row['prompt']} {number} {row['completion']}" for number, row in enumerate(CORPUS[:2000])]
    batches = [texts[start : start + 50] for start in range(0, len(texts), 50)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(words.encode_all, batches * 3))
    assert [ids for batch in found for ids in batch] == by_library(backend, texts) * 3
    assert words._trusted
