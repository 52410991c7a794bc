"""Tokenizers of every kind, small and trained on the spot, and chat templates in the shape of well-known ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

CORPUS = [
    "How do I boil an egg? Put it into boiling water for eight minutes. Hello there, it is Paris, the capital of",
    "France. What is the capital of France? user assistant system model Be kind. So? Well, yes; no: 1 2 3 (of course)!",
    "the theatre there then that other understand under stand standing thoughts I am thinking",
] * 3  # fmt: skip
_BYTES = [f"<0x{number:02X}>" for number in range(256)]
# White space as SentencePiece keeps it where nothing else is asked for: single spaces, none at the end.
_T5 = normalizers.Sequence([
    normalizers.NFKC(), normalizers.Replace("\n", " "), normalizers.Strip(left=False, right=True),
    normalizers.Replace(Regex(" {2,}"), " "),
])  # fmt: skip
UNKNOWN, BOS, EOS = _BASIC = ["<unk>", "<s>", "</s>"]
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@cache
def _pieces() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges as SentencePiece trains them, with a space before each word and a token for each byte."""
    trained = Tokenizer(models.BPE())
    words = ["▁" + word for text in CORPUS for word in text.split()]
    trained.train_from_iterator(words, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    state = json.loads(trained.to_str())["model"]
    names = [*_BASIC, *_BYTES, *sorted(state["vocab"], key=state["vocab"].get)]
    return {name: number for number, name in enumerate(names)}, [tuple(merge) for merge in state["merges"]]


def _sentencepiece(byte_fallback: bool = True) -> Tokenizer:
    vocabulary, merges = _pieces()
    made = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=UNKNOWN, fuse_unk=True, byte_fallback=byte_fallback)
    )
    first = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*first, decoders.Strip(content=" ", left=1)])
    return made


def _metaspace(scheme: str, split: bool = False) -> Tokenizer:
    made = _sentencepiece()
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    if scheme == "never":
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made


def _prepend() -> Tokenizer:
    made = _sentencepiece()
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return made


def _unigram(scheme: str, byte_fallback: bool, normalizer: Any = None) -> Tokenizer:
    trained = Tokenizer(models.Unigram())
    if normalizer is not None:
        trained.normalizer = normalizer
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    special = [*_BASIC, *(_BYTES if byte_fallback else ())]
    trained.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=560, show_progress=False, special_tokens=special, unk_token=UNKNOWN)
    )
    vocabulary = [tuple(piece) for piece in json.loads(trained.to_str())["model"]["vocab"]]
    made = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=byte_fallback))
    if normalizer is not None:
        made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    steps = [decoders.ByteFallback()] if byte_fallback else []
    made.decoder = decoders.Sequence([*steps, decoders.Metaspace(prepend_scheme=scheme)])
    return made


def _byte_level(
    prefix_space: bool = False, pattern: str = "", normalizer: Any = None, whole: bool = False
) -> Tokenizer:
    def with_parts(made: Tokenizer) -> Tokenizer:
        level = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=not pattern)
        split = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
        made.pre_tokenizer = pre_tokenizers.Sequence([*split, level]) if split else level
        made.decoder = decoders.ByteLevel()
        if normalizer is not None:
            made.normalizer = normalizer
        return made

    trained = with_parts(Tokenizer(models.BPE()))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=420, show_progress=False, initial_alphabet=alphabet)
    trained.train_from_iterator([*CORPUS, "one\n\ntwo\n\nthree\n\n", "  a  b  c"], trainer)
    state = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in state["merges"]]
    return with_parts(Tokenizer(models.BPE(vocab=state["vocab"], merges=merges, ignore_merges=whole)))


def _wordpiece(lowercase: bool) -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    made.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(cleanup=False)
    made.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=300, show_progress=False, special_tokens=_BASIC)
    )
    return made


def _gemma() -> Tokenizer:
    made = _sentencepiece()
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "SentencePiece, space at the beginning": lambda: _metaspace("first"),
    "SentencePiece, space at the beginning, words apart": lambda: _metaspace("first", split=True),
    "SentencePiece, space after control tokens too": lambda: _metaspace("always"),
    "SentencePiece, no space": lambda: _metaspace("never"),
    "SentencePiece, space by the normalizer": _prepend,
    "SentencePiece, no bytes": lambda: _sentencepiece_without_bytes(),
    "Gemma": _gemma,
    "Unigram": lambda: _unigram("first", byte_fallback=True),
    "Unigram, space after control tokens too, no bytes": lambda: _unigram("always", False, normalizers.NFKC()),
    "Unigram, in the manner of T5": lambda: _unigram("always", byte_fallback=True, normalizer=_T5),
    "bytes": _byte_level,
    "bytes, in the manner of Llama 3": lambda: _byte_level(pattern=_LLAMA_3, whole=True),
    "bytes, in the manner of Qwen": lambda: _byte_level(pattern=_LLAMA_3, normalizer=normalizers.NFC()),
    "bytes, a space before": lambda: _byte_level(prefix_space=True),
    "WordPiece": lambda: _wordpiece(lowercase=False),
    "WordPiece, small letters": lambda: _wordpiece(lowercase=True),
}  # fmt: skip


def _sentencepiece_without_bytes() -> Tokenizer:
    made = _sentencepiece(byte_fallback=False)
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return made


def made_tokenizer(kind: str, template: str, control: Sequence[str] = (), strip: bool = False) -> Any:
    """A tokenizer of a kind with a chat template, of whose markup some pieces may be control tokens."""
    tokens = Tokenizer.from_str(_described(kind))
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokens, unk_token=UNKNOWN, bos_token=BOS, eos_token=EOS, pad_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    made.add_tokens([AddedToken(name, special=True, normalized=False, rstrip=strip) for name in control], True)
    made.chat_template = template
    return made


@cache
def _described(kind: str) -> str:
    return KINDS[kind]().to_str()


def made_llama(template: str, control: Sequence[str], **options: Any) -> Any:
    """A tokenizer of transformers' class for Llama 2, Mistral, Phi-3 and TinyLlama."""
    vocabulary, merges = _pieces()
    made = LlamaTokenizer(vocab=vocabulary, merges=merges, pad_token=UNKNOWN, **options)
    made.add_tokens([AddedToken(name, special=True, normalized=False) for name in control], True)
    made.chat_template = template
    return made


_EACH = "{% for m in messages %}"
_ASKED = "{% endfor %}{% if add_generation_prompt %}"
# Name: the template, and which of its pieces are control tokens where any are.
TEMPLATES: dict[str, tuple[str, list[str]]] = {
    "ChatML": (
        _EACH + "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n" + _ASKED
        + "<|im_start|>assistant\n{% endif %}", ["<|im_start|>", "<|im_end|>"],
    ),
    "Zephyr": (
        _EACH + "<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n" + _ASKED + "<|assistant|>\n{% endif %}", [],
    ),
    "Phi-3": (
        _EACH + "<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n" + _ASKED + "<|assistant|>\n{% endif %}",
        ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    ),
    "Mistral 1": (
        "<s>" + _EACH + "{% if m['role'] == 'assistant' %}{{ m['content'] }}</s>"
        "{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}", [],
    ),
    "Mistral 3": (
        "<s>" + _EACH + "{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim }}</s>"
        "{% else %}[INST] {{ m['content'] }}[/INST]{% endif %}{% endfor %}", ["[INST]", "[/INST]"],
    ),
    "Llama 2": (
        _EACH + "{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ' </s>' }}"
        "{% else %}{{ '<s>[INST] ' + m['content'] | trim + ' [/INST]' }}{% endif %}{% endfor %}", [],
    ),
    "Llama 3": (
        "<|begin_of_text|>" + _EACH + "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
        "{{ m['content'] | trim }}<|eot_id|>" + _ASKED + "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    ),
    "Gemma": (
        "<s>" + _EACH + "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
        "{{ m['content'] | trim }}<end_of_turn>\n" + _ASKED + "<start_of_turn>model\n{% endif %}",
        ["<start_of_turn>", "<end_of_turn>"],
    ),
    "Qwen 3": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "{% if loop.last or '</think>' in m['content'] %}<think>\n"
        "{{ m['content'].split('</think>')[0].split('<think>')[1].strip() if '</think>' in m['content'] }}"
        "\n</think>\n\n{% endif %}{{ m['content'].split('</think>')[-1].lstrip('\n') }}"
        "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n" + _ASKED + "<|im_start|>assistant\n{% endif %}",
        ["<|im_start|>", "<|im_end|>"],
    ),
    "DeepSeek": (
        "<s>" + _EACH + "{% if m['role'] == 'assistant' %}<｜Assistant｜>{% generation %}{{ m['content'] }}</s>"
        "{% endgeneration %}{% else %}<｜User｜>{{ m['content'] }}{% endif %}" + _ASKED + "<｜Assistant｜>{% endif %}",
        ["<｜User｜>", "<｜Assistant｜>"],
    ),
    "Alpaca": (
        _EACH + "{% if m['role'] == 'assistant' %}{{ m['content'] }}</s>\n\n{% else %}"
        "### Instruction:\n{{ m['content'] }}\n\n### Response:\n{% endif %}{% endfor %}", [],
    ),
    "plain": ("{% for message in messages %}{{ message['content'] }}{% endfor %}", []),
}  # fmt: skip
