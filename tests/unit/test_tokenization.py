"""Prompt and completion become tokens whose boundary never merges and whose loss is the assistant's words alone."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from bco_lightning.batch import FeedbackRow, TokenizedSample
from bco_lightning.data.tokenization import RowTokenizer
from bco_lightning.errors import ConfigError, FeedbackRowError, LanguageModelError


def row(prompt: str | list[dict[str, str]], completion: str | list[dict[str, str]]) -> FeedbackRow:
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    return FeedbackRow(prompt, completion, True, "log.jsonl:1")


def tokenize(tokenizer: Any, a_row: FeedbackRow, max_length: int = 512, **options: Any) -> TokenizedSample:
    sample = RowTokenizer(tokenizer, max_length, **options).tokenize(a_row)
    assert sample is not None
    return sample


def spoken(tokenizer: Any, sample: TokenizedSample) -> str:
    return tokenizer.decode([t for t, loss in zip(sample.input_ids, sample.completion_mask, strict=True) if loss])


def test_loss_is_on_the_completion_and_its_end_token(tokenizer: Any) -> None:
    sample = tokenize(tokenizer, row("Hi?", "Hello there."))
    assert spoken(tokenizer, sample) == "Hello there.<|im_end|>"
    assert sample.input_ids[-1] == tokenizer.eos_token_id


def test_text_is_what_the_chat_template_renders(tokenizer: Any) -> None:
    a_row = row("Hi?", "Hello there.")
    rendered = tokenizer.apply_chat_template(a_row.prompt + a_row.completion, tokenize=False)
    assert tokenizer.decode(tokenize(tokenizer, a_row).input_ids) == rendered.removesuffix("\n")


def test_prompt_and_completion_never_merge_at_their_boundary(tokenizer: Any) -> None:
    together = tokenizer("under" + "stand", add_special_tokens=False)["input_ids"]
    sample = tokenize(tokenizer, row("under", "stand"), chat_template="plain")
    assert len(together) == 1  # so that the test can fail
    assert spoken(tokenizer, sample) == "stand<|im_end|>"
    assert sample.completion_mask[0] is False


def test_user_turns_inside_a_completion_carry_no_loss(tokenizer: Any) -> None:
    completion = [
        {"role": "assistant", "content": "First."},
        {"role": "user", "content": "More?"},
        {"role": "assistant", "content": "Second."},
    ]
    sample = tokenize(tokenizer, row("Hi?", completion))
    assert spoken(tokenizer, sample) == "First.<|im_end|>Second.<|im_end|>"
    assert "More?" in tokenizer.decode(sample.input_ids)


def test_a_template_without_an_end_token_gets_one(tokenizer: Any) -> None:
    sample = tokenize(tokenizer, row("One plus", " one"), chat_template="plain")
    assert tokenizer.decode(sample.input_ids) == "One plus one<|im_end|>"


def test_a_template_can_come_from_a_file(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}", encoding="utf-8")
    sample = tokenize(tokenizer, row("a", "b"), chat_template=str(path))
    assert tokenizer.decode(sample.input_ids) == "[user] a [assistant] b <|im_end|>"


@pytest.mark.parametrize("max_length", range(2, 60))
def test_nothing_is_longer_than_the_limit_and_something_always_carries_loss(tokenizer: Any, max_length: int) -> None:
    sample = tokenize(tokenizer, row("word " * 30, "answer " * 20), max_length=max_length)
    assert len(sample.input_ids) == len(sample.completion_mask) == max_length
    assert any(sample.completion_mask)
    assert sample.prompt_cut
    assert sample.completion_cut is (sample.input_ids[-1] != tokenizer.eos_token_id)


def test_a_cut_completion_gets_no_end_token(tokenizer: Any) -> None:
    sample = tokenize(tokenizer, row("Hi?", "answer " * 100), max_length=64)
    assert sample.completion_cut
    assert tokenizer.eos_token_id not in [
        t for t, loss in zip(sample.input_ids, sample.completion_mask, strict=True) if loss
    ]


def test_an_over_long_prompt_keeps_its_system_message_and_its_end(tokenizer: Any) -> None:
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "filler " * 100 + "the question"}]
    text = tokenizer.decode(tokenize(tokenizer, row(prompt, "Yes."), max_length=60).input_ids)
    assert text.startswith("<|im_start|>system\nBe kind.<|im_end|>")
    assert text.endswith("the question<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>")


@pytest.fixture
def bos_tokenizer(tokenizer: Any) -> Any:
    """A tokenizer that begins every text with a BOS token of its own, as those of Llama and Gemma do."""
    other = copy.deepcopy(tokenizer)
    other.bos_token = "<|endoftext|>"
    other.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", other.bos_token_id)]
    )
    return other


def test_a_plain_prompt_begins_with_the_tokenizers_own_bos_and_keeps_it_when_cut(bos_tokenizer: Any) -> None:
    for max_length in (512, 40):
        sample = tokenize(bos_tokenizer, row("word " * 100, "Yes."), max_length=max_length, chat_template="plain")
        assert sample.input_ids[0] == bos_tokenizer.bos_token_id
        assert sample.input_ids.count(bos_tokenizer.bos_token_id) == 1


def test_a_template_that_refuses_the_messages_names_the_row(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text("{{ raise_exception('no system messages') }}", encoding="utf-8")
    with pytest.raises(FeedbackRowError, match=r"log\.jsonl:1: .*no system messages"):
        tokenize(tokenizer, row("a", "b"), chat_template=str(path))


def test_rows_over_the_limit_are_dropped_if_asked(tokenizer: Any) -> None:
    drop = RowTokenizer(tokenizer, 40, too_long="drop")
    assert drop.tokenize(row("Hi?", "answer " * 100)) is None
    assert drop.tokenize(row("Hi?", "Yes.")) is not None


def test_a_tokenizer_without_chat_template_is_refused_with_the_remedy() -> None:
    with pytest.raises(LanguageModelError, match=r"chat template.*Set data\.chat_template"):
        RowTokenizer(SimpleNamespace(chat_template=None), 10)


def test_a_missing_template_file_is_named(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"nope\.jinja"):
        RowTokenizer(tokenizer, 10, chat_template="nope.jinja")


def test_a_template_that_rewrites_the_prompt_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text("{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}", encoding="utf-8")
    with pytest.raises(FeedbackRowError, match=r"log\.jsonl:1: .*only appends"):
        tokenize(tokenizer, row("a", "b"), chat_template=str(path))
