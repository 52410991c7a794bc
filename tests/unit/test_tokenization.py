"""Prompt and completion become tokens whose boundary never merges and whose loss is the assistant's words alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from bco_lightning.batch import FeedbackRow, LeftOut, TokenizedSample
from bco_lightning.data.chat import PLAIN_TEMPLATE
from bco_lightning.data.options import DataOptions
from bco_lightning.data.tokenize import RowTokenizer
from bco_lightning.errors import ConfigError, FeedbackRowError, LanguageModelError
from tests.conftest import tokenized_row
from tests.reliability.tiny_run import byte_tokenizer


def row(prompt: str | list[dict[str, str]], completion: str | list[dict[str, str]]) -> FeedbackRow:
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    return FeedbackRow(prompt, completion, True, "log.jsonl:1")


def outcome(
    tokenizer: Any, a_row: FeedbackRow, max_length: int = 512, chat_template: str | None = None, **limits: Any
) -> TokenizedSample | LeftOut:
    options = DataOptions(max_length=max_length, chat_template=chat_template, **limits)
    return tokenized_row(RowTokenizer(tokenizer, options), a_row)


def tokenize(tokenizer: Any, a_row: FeedbackRow, *args: Any, **options: Any) -> TokenizedSample:
    sample = outcome(tokenizer, a_row, *args, **options)
    assert isinstance(sample, TokenizedSample)
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


@pytest.mark.parametrize(
    ("says", "found"),
    [
        ("raise_exception('no questions')", "no questions"),
        ("raise_exception(m['content'])", "TemplateError in line 3 of the template"),
        ("raise_exception('no questions such as ' ~ m['content'])", "TemplateError in line 3 of the template"),
        ("raise_exception('')", "TemplateError in line 3 of the template"),
        ("m['content'] + 1", "TypeError in line 3 of the template"),
        ("1 / 0", "ZeroDivisionError in line 3 of the template"),
        ("range(999999999)", "OverflowError in line 3 of the template"),
    ],
)
@pytest.mark.parametrize("more", [{}, {"name": "Ada"}], ids=["plain messages", "messages with more"])
def test_of_what_a_template_says_only_its_own_words_are_shown(
    tokenizer: Any, tmp_path: Path, says: str, found: str, more: dict[str, Any]
) -> None:
    path = tmp_path / "template.jinja"
    path.write_text(f"{{% for m in messages %}}\n{{% if 'Bremen?' in m['content'] %}}\n{{{{ {says} }}}}\n"
                    "{% endif %}{{ m['content'] }}{% endfor %}", encoding="utf-8")  # fmt: skip
    asked = row([{"role": "user", "content": "Born in Bremen?", **more}], "b")
    with pytest.raises(FeedbackRowError) as caught:
        tokenize(tokenizer, asked, chat_template=str(path))
    assert caught.value.problem.endswith(f"found that it refuses them ({found}).")
    assert "Bremen" not in str(caught.value)


def test_a_tokenizer_without_chat_template_is_refused_with_the_remedy() -> None:
    tokenizer = SimpleNamespace(chat_template=None, name_or_path="", eos_token_id=1)
    with pytest.raises(LanguageModelError, match=r"chat template.*Set data\.chat_template"):
        RowTokenizer(tokenizer, DataOptions())


def test_a_missing_template_file_is_named(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"nope\.jinja"):
        RowTokenizer(tokenizer, DataOptions(chat_template="nope.jinja"))


def test_a_template_that_rewrites_the_prompt_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text("{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}", encoding="utf-8")
    with pytest.raises(FeedbackRowError, match=r"log\.jsonl:1: .*only appends"):
        tokenize(tokenizer, row("a", "b"), chat_template=str(path))


# Lengths by hand in the byte tokenizer's ChatML, one token for each byte and each control token.
HEADER = len("assistant\n") + 1
USER_MARKUP = len("user\n") + len("\n") + 2
SYSTEM = [{"role": "system", "content": "Be kind."}]
SYSTEM_TOKENS = len("system\nBe kind.\n") + 2
BYTES = byte_tokenizer()


@st.composite
def limits_and_lengths(draw: st.DrawFn) -> tuple[DataOptions, int, int, bool]:
    max_length = draw(st.integers(2, 120))
    max_prompt_length = draw(st.none() | st.integers(1, max_length - 1))
    limits = DataOptions(
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        long_prompts=draw(st.sampled_from(["keep_end", "keep_start", "drop"])),
        long_completions=draw(st.sampled_from(["cut", "drop"])),
    )
    return limits, draw(st.integers(1, 150)), draw(st.integers(1, 150)), draw(st.booleans())


@settings(max_examples=400, deadline=None)
@given(limits_and_lengths())
def test_whatever_the_limits_a_row_keeps_to_them_or_says_why_it_is_left_out(
    case: tuple[DataOptions, int, int, bool],
) -> None:
    limits, num_asked, num_answered, with_system = case
    system = SYSTEM if with_system else []
    a_row = row([*system, {"role": "user", "content": "q" * num_asked}], "a" * num_answered)
    sample = tokenized_row(RowTokenizer(BYTES, limits), a_row)
    num_prompt = with_system * SYSTEM_TOKENS + USER_MARKUP + num_asked + HEADER
    fits = num_prompt + num_answered + 1 <= limits.max_length
    fits = fits and num_prompt <= (limits.max_prompt_length or limits.max_length)
    if isinstance(sample, LeftOut):
        assert not fits
        assert sample == LeftOut("log.jsonl:1", sample.reason)
        assert _is_left_out_rightly(limits, sample.reason, num_prompt, num_answered, with_system)
        return
    assert len(sample.input_ids) == len(sample.completion_mask) <= limits.max_length
    assert (sample.prompt_length, sample.completion_length) == (num_prompt, num_answered + 1)
    kept_prompt = sample.completion_mask.index(True)
    spoken = sample.input_ids[kept_prompt:]
    assert all(sample.completion_mask[kept_prompt:])
    assert BYTES.decode(spoken).removesuffix("<|im_end|>") == "a" * min(num_answered, len(spoken))
    assert spoken[0] != BYTES.eos_token_id
    assert sample.completion_cut is (spoken[-1] != BYTES.eos_token_id) is (len(spoken) < num_answered + 1)
    assert sample.prompt_cut is (kept_prompt < num_prompt)
    assert kept_prompt <= (limits.max_prompt_length or limits.max_length)
    assert fits is not (sample.prompt_cut or sample.completion_cut)
    assert not (sample.prompt_cut and limits.long_prompts == "drop")
    assert not (sample.completion_cut and limits.long_completions == "drop")
    if sample.prompt_cut:
        system_text = "<|im_start|>system\nBe kind.<|im_end|>\n" * with_system
        kept = BYTES.decode(sample.input_ids[:kept_prompt])
        _prompt_is_cut_where_it_should(limits.long_prompts, kept, system_text, "q" * num_asked)


def _is_left_out_rightly(limits: DataOptions, reason: str, num_prompt: int, num_answered: int, system: bool) -> bool:
    room = limits.max_prompt_length or max(limits.max_length - num_answered - 1, limits.max_length // 2)
    stays = {"keep_end": system * SYSTEM_TOKENS, "keep_start": HEADER + len("\n") + 1, "drop": 0}
    over = "prompt over data.max_prompt_length" if limits.max_prompt_length else "prompt too long (data.max_length)"
    return {
        over: limits.long_prompts == "drop" and num_prompt > room,
        "completion too long (data.max_length)": limits.long_completions == "drop"
        and num_answered + 1 > limits.max_length - min(num_prompt, room),
        "no room for a prompt": stays[limits.long_prompts] >= room,
    }[reason]


def _prompt_is_cut_where_it_should(policy: str, prompt: str, system: str, asked: str) -> None:
    closing = "<|im_end|>\n<|im_start|>assistant\n"
    whole = f"{system}<|im_start|>user\n{asked}{closing}"
    if policy == "keep_start":
        assert prompt.endswith(closing)
        assert whole.startswith(prompt.removesuffix(closing))
    else:
        assert prompt.startswith(system)
        assert whole.endswith(prompt.removeprefix(system))


@pytest.mark.parametrize(
    ("limits", "problem"),
    [
        ({"max_length": 1}, "data.max_length: expected at least 2 tokens, found 1."),
        ({"max_prompt_length": 0}, "data.max_prompt_length: expected at least 1 token"),
        ({"max_length": 64, "max_prompt_length": 64}, r"fewer than data.max_length \(64\), found 64"),
        ({"long_prompts": "cut"}, "data.long_prompts: expected keep_end or keep_start or drop, found 'cut'"),
        ({"long_completions": "keep"}, "data.long_completions: expected cut or drop, found 'keep'"),
    ],
)
def test_limits_that_leave_no_room_or_are_unknown_are_refused_by_name(limits: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        DataOptions(**limits)


LONG = "word " * 100


@pytest.mark.parametrize(
    ("prompt", "completion", "limits", "reason"),
    [
        (LONG, "Yes.", {"max_length": 60, "long_prompts": "drop"}, "prompt too long (data.max_length)"),
        (
            LONG,
            "Yes.",
            {"max_length": 512, "max_prompt_length": 60, "long_prompts": "drop"},
            "prompt over data.max_prompt_length",
        ),
        ("Hi?", LONG, {"max_length": 60, "long_completions": "drop"}, "completion too long (data.max_length)"),
        (
            [{"role": "system", "content": LONG}, {"role": "user", "content": "?"}],
            "Yes.",
            {"max_length": 60},
            "no room for a prompt",
        ),
        (
            LONG,
            "Yes.",
            {"max_length": 60, "max_prompt_length": 3, "long_prompts": "keep_start"},
            "no room for a prompt",
        ),
    ],
)
def test_a_row_that_is_left_out_says_why(
    tokenizer: Any, prompt: Any, completion: str, limits: dict[str, Any], reason: str
) -> None:
    assert outcome(tokenizer, row(prompt, completion), **limits) == LeftOut("log.jsonl:1", reason)


def test_the_policies_touch_no_row_within_the_limits(tokenizer: Any) -> None:
    a_row = row("Hi?", "Yes.")
    whole = tokenize(tokenizer, a_row)
    fitting = {"max_length": len(whole.input_ids), "max_prompt_length": whole.prompt_length}
    for policies in (("keep_end", "cut"), ("keep_start", "cut"), ("drop", "drop")):
        named = dict(zip(("long_prompts", "long_completions"), policies, strict=True))
        assert tokenize(tokenizer, a_row, **fitting, **named) == whole


def test_a_prompt_over_its_own_limit_is_cut_even_if_the_row_would_fit(tokenizer: Any) -> None:
    sample = tokenize(tokenizer, row(LONG, "Yes."), max_prompt_length=40)
    assert sample.completion_mask.index(True) == 40
    assert (sample.prompt_cut, sample.completion_cut) == (True, False)
    assert sample.prompt_length > 100


def test_a_prompt_that_keeps_its_start_still_ends_where_the_assistant_speaks(tokenizer: Any) -> None:
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "first " + LONG + "last"}]
    text = tokenizer.decode(
        tokenize(tokenizer, row(prompt, "Yes."), max_length=60, long_prompts="keep_start").input_ids
    )
    assert text.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nfirst word word")
    assert text.endswith(" word<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>")


def test_a_prompt_that_keeps_its_start_is_closed_where_the_template_has_no_header(
    tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "template.jinja"  # asks as the early Mistral models are asked
    path.write_text(
        "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}",
        encoding="utf-8",
    )
    sample = tokenize(tokenizer, row(LONG, "Yes."), 40, str(path), long_prompts="keep_start")
    assert tokenizer.decode(sample.input_ids).startswith("[INST] word word")
    assert tokenizer.decode(sample.input_ids).endswith("word [/INST] Yes.<|im_end|>")


def test_a_plain_prompt_that_keeps_its_start_ends_anywhere(tokenizer: Any) -> None:
    sample = tokenize(tokenizer, row("one two three four five", " six"), 6, "plain", long_prompts="keep_start")
    assert tokenizer.decode(sample.input_ids) == "one two three four six<|im_end|>"


def test_a_completion_cut_to_markup_alone_is_left_out(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|><|im_start|>{% endif %}"
        "{{ m['content'] }}<|im_end|>{% endfor %}",
        encoding="utf-8",
    )
    short = {"chat_template": str(path), "max_prompt_length": 2}
    assert outcome(tokenizer, row("a", "b"), 4, **short) == LeftOut("log.jsonl:1", "no room for a completion")
    assert tokenizer.decode(tokenize(tokenizer, row("a", "b"), 5, **short).input_ids).endswith("<|im_start|>b")


def test_a_completion_whose_only_word_comes_first_of_all_is_left_out(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text(
        "{% for m in messages if m['role'] == 'assistant' %}{{ m['content'] }}<|im_end|>{% endfor %}", encoding="utf-8"
    )
    assert isinstance(outcome(tokenizer, row("a", "b"), chat_template=str(path)), LeftOut)
    assert isinstance(outcome(tokenizer, row("a", "b b"), chat_template=str(path)), TokenizedSample)


def test_a_template_that_prints_only_the_end_of_a_completion_names_the_row(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text(
        "{% for m in messages %}{{ m['content'] if m['role'] == 'user' }}<|im_end|>\n{% endfor %}", encoding="utf-8"
    )
    with pytest.raises(FeedbackRowError, match=r"log\.jsonl:1: .*tokens to learn from, found none"):
        tokenize(tokenizer, row("a", "b"), chat_template=str(path))


def test_rows_tokenized_together_come_out_as_they_do_alone(tokenizer: Any) -> None:
    rows = [row("Hi?", "Hello."), row("Hi?", "<|im_end|>"), row(LONG, "Yes."), row("Hi?", LONG)]
    row_tokenizer = RowTokenizer(tokenizer, DataOptions(max_length=60, long_completions="drop"))
    together = [outcome for _, outcome in row_tokenizer.tokenize(rows)]
    assert together == [tokenized_row(row_tokenizer, one) for one in rows]
    assert [type(one) for one in together] == [TokenizedSample, TokenizedSample, TokenizedSample, LeftOut]


def test_one_bad_row_of_several_is_an_outcome_of_its_own(tokenizer: Any) -> None:
    two_in_a_row = row("Hi?", [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}])
    row_tokenizer = RowTokenizer(tokenizer, DataOptions(max_length=60))
    outcomes = [outcome for _, outcome in row_tokenizer.tokenize([row("Hi?", "Yes."), two_in_a_row])]
    assert isinstance(outcomes[0], TokenizedSample)
    assert isinstance(outcomes[1], FeedbackRowError)
    assert "found two in a row" in str(outcomes[1])


# What a template is told beside the messages.
TELLING = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if style is defined %}{{ style }}:{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}{{ call['function'] | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def telling(tmp_path: Path) -> str:
    path = tmp_path / "telling.jinja"
    path.write_text(TELLING, encoding="utf-8")
    return str(path)


def test_tools_and_options_of_a_row_reach_the_template(tokenizer: Any, telling: str) -> None:
    told = replace(row("Hi?", "Yes."), tools=[{"name": "add"}], template_options={"style": "brief"})
    text = tokenizer.decode(tokenize(tokenizer, told, chat_template=telling).input_ids)
    assert text == '[{"name": "add"}]brief:<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>'


def test_neighbouring_rows_of_one_prompt_keep_their_own_options(tokenizer: Any, telling: str) -> None:
    rows = [replace(row("Hi?", "Yes."), template_options={"style": style}) for style in ("brief", "long")]
    samples = [outcome for _, outcome in RowTokenizer(tokenizer, DataOptions(chat_template=telling)).tokenize(rows)]
    texts = [tokenizer.decode(sample.input_ids) for sample in samples if isinstance(sample, TokenizedSample)]
    assert [text[: text.index(":")] for text in texts] == ["brief", "long"]


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_a_completion_that_is_a_tool_call_carries_loss(
    tokenizer: Any, telling: str, content: dict[str, str | None]
) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    calling = row("1 + 1?", [{"role": "assistant", "tool_calls": [call], **content}])
    sample = tokenize(tokenizer, calling, chat_template=telling)
    assert spoken(tokenizer, sample) == '{"name": "add", "arguments": {"a": 1}}<|im_end|>'


@pytest.mark.parametrize(
    "name", ["messages", "tools", "add_generation_prompt", "tokenize", "chat_template", "eos_token", "return_dict"]
)
def test_an_option_that_every_template_is_given_names_the_row(tokenizer: Any, name: str) -> None:
    with pytest.raises(FeedbackRowError, match=rf"log\.jsonl:1: .*found '{name}'"):
        tokenize(tokenizer, replace(row("Hi?", "Yes."), template_options={name: True}))


def test_a_tokenizer_with_a_template_for_tools_uses_it_for_rows_with_tools(tokenizer: Any) -> None:
    other = copy.deepcopy(tokenizer)
    other.chat_template = {"default": PLAIN_TEMPLATE, "tool_use": TELLING}
    with_tools = replace(row("a", "b"), tools=[{"name": "add"}])
    assert tokenizer.decode(tokenize(other, row("a", "b")).input_ids) == "ab<|im_end|>"
    assert tokenizer.decode(tokenize(other, with_tools).input_ids).startswith('[{"name": "add"}]<|im_start|>')
