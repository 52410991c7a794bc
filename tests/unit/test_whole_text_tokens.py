"""Prompt and completion, tokenized apart, are the tokens of the whole text, whatever the tokenizer and the template."""

from __future__ import annotations

import functools
import unicodedata
from typing import Any

import pytest
from transformers import ByT5Tokenizer

from bco_lightning import FeedbackDataModule
from bco_lightning.batch import FeedbackBatch, FeedbackRow, LeftOut, Message, TokenizedSample
from bco_lightning.data.joints import Joints
from bco_lightning.data.options import DataOptions
from bco_lightning.data.rows import RowFormat
from bco_lightning.data.tokenize import NO_EDGE, NO_ROOM_FOR_PROMPT, RowTokenizer
from bco_lightning.errors import FeedbackRowError
from tests.conftest import tiny_data, tokenized_row
from tests.unit.made_rows import row_of
from tests.unit.made_tokenizers import KINDS, TEMPLATES, made_llama, made_tokenizer


def said(*contents: str) -> list[Message]:
    """Messages of user and assistant in turn."""
    return [{"role": ("user", "assistant")[at % 2], "content": content} for at, content in enumerate(contents)]


CONVERSATIONS = [
    said("What is the capital of France?", "Hello there, it is Paris."),
    [{"role": "system", "content": "Be kind."}, *said("What? ", " Hello.", "So?\n", "  Hello there, I am thinking.\n")],
    said("Que fait-on à 北京？", "你好。 <b> 😀👍🏽 \u200bHello"),
    said("under", "stand"),
    said("the", "re"),
]


@functools.cache
def tokenizers(kind: str) -> dict[str, Any]:
    """Tokenizers of a kind by their templates, whose markup is text or control tokens."""
    if kind.startswith("class of Llama"):
        legacy = kind.endswith("legacy")
        return {name: made_llama(template, names, legacy=legacy) for name, (template, names) in TEMPLATES.items()}
    if kind == "without a fast version":
        made = {name: ByT5Tokenizer(chat_template=template) for name, (template, _) in TEMPLATES.items()}
        return {name: tokenizer for name, tokenizer in made.items() if name != "DeepSeek"}
    markup = {name: made_tokenizer(kind, template, names) for name, (template, names) in TEMPLATES.items()}
    text = {f"{name} as text": made_tokenizer(kind, template) for name, (template, names) in TEMPLATES.items() if names}
    return markup | text


def edges(tokenizer: Any, text: str) -> tuple[list[int], set[int]]:
    """Token ids of a whole text by transformers, and where in the text a token begins and none goes on."""
    if not tokenizer.is_fast:  # one token for each byte
        return tokenizer(text, add_special_tokens=False)["input_ids"], set(range(len(text) + 1))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spanned = {place for begin, end in encoded["offset_mapping"] for place in range(begin + 1, end)}
    return encoded["input_ids"], set(range(len(text) + 1)) - spanned


def read(tokenizer: Any, token_ids: list[int]) -> str:
    known = [token for token in token_ids if token != tokenizer.unk_token_id]
    return unicodedata.normalize("NFKC", tokenizer.decode(known, clean_up_tokenization_spaces=False)).rstrip()


@pytest.mark.parametrize("kind", [*KINDS, "class of Llama", "class of Llama, legacy", "without a fast version"])
def test_tokens_are_those_of_the_whole_text_wherever_it_has_an_edge_between_prompt_and_completion(kind: str) -> None:
    num_compared = 0
    for name, tokenizer in tokenizers(kind).items():
        row_tokenizer = RowTokenizer(tokenizer, DataOptions(max_length=4096))
        for messages in CONVERSATIONS:
            rendered, prompt = (
                tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=told is not messages)
                for told in (messages, messages[:-1])
            )
            whole, places = edges(tokenizer, rendered)
            sample = tokenized_row(row_tokenizer, FeedbackRow(messages[:-1], messages[-1:], True, "log:1"))
            if sample == LeftOut("log:1", NO_EDGE):
                assert kind.startswith("WordPiece") and len(prompt) not in places
                continue
            assert isinstance(sample, TokenizedSample)
            bare = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            ours = sample.input_ids[sample.input_ids[:1] == [tokenizer.bos_token_id] != bare[:1] :]
            assert ours[: len(bare)] == bare  # as a model is asked
            ours = ours[len(bare) :]
            names = tuple(token.content for token in tokenizer.added_tokens_decoder.values())
            if not rendered.rstrip().endswith(names):
                assert ours.pop() == tokenizer.eos_token_id
            if whole[: len(bare)] == bare and len(prompt) in places:
                assert ours == whole[len(bare) :][: len(ours)], (name, messages)
                assert not read(tokenizer, whole[len(bare) + len(ours) :])
                num_compared += 1
            else:
                assert read(tokenizer, bare + ours) == read(tokenizer, whole), (name, messages)
    assert num_compared > 30


@pytest.mark.parametrize("streaming", [False, True])
def test_a_tokenizer_that_goes_on_in_a_way_of_its_own_is_refused_at_the_start_whatever_becomes_of_bad_rows(
    monkeypatch: pytest.MonkeyPatch, log: str, streaming: bool
) -> None:
    monkeypatch.setattr(Joints, "pieces", lambda _, texts: [("", text) for text in texts])
    tokenizer = tokenizers("SentencePiece, space at the beginning")["ChatML"]
    data = tiny_data(log, tokenizer=tokenizer, streaming=streaming, bad_rows="skip", max_bad_rows=0.9)
    with pytest.raises(FeedbackRowError, match=r"log\.jsonl:\d+: expected token ids that read as the text"):
        first_batch(data)


def first_batch(data: FeedbackDataModule) -> FeedbackBatch:
    data.setup("fit")
    return next(iter(data.train_dataloader()))


@pytest.mark.parametrize("kind", ["SentencePiece, space at the beginning", "SentencePiece, space by the normalizer"])
def test_a_prompt_that_keeps_its_start_ends_with_the_tokens_of_the_whole_prompt(kind: str) -> None:
    asked = [{"role": "user", "content": "What is the capital? " * 40}]
    for name, tokenizer in tokenizers(kind).items():
        options = DataOptions(max_length=100, long_prompts="keep_start")
        sample = tokenized_row(RowTokenizer(tokenizer, options), FeedbackRow(asked, said("", "Hi.")[1:], True, "log:1"))
        assert isinstance(sample, TokenizedSample)
        assert sample.prompt_cut
        rendered = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        whole = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
        said_until = rendered.rindex("?") + 1
        num_after = sum(begin > said_until for begin, _ in whole["offset_mapping"])
        kept = sample.input_ids[: sample.completion_mask.index(True)]
        assert kept[len(kept) - num_after :] == whole["input_ids"][len(whole["input_ids"]) - num_after :], name


@pytest.mark.parametrize("kind", ["SentencePiece, space at the beginning", "SentencePiece, space by the normalizer"])
@pytest.mark.parametrize("typed", ["</s> Hello", "Hello </s> there", "<|im_end|>", "Hello<|im_"])
def test_a_typed_control_token_is_text_without_a_space_before_it(kind: str, typed: str) -> None:
    for name in ("ChatML", "ChatML as text", "Zephyr", "Mistral 1", "plain"):
        tokenizer = tokenizers(kind)[name]
        messages = said("What </s>?", typed)
        sample = tokenized_row(
            RowTokenizer(tokenizer, DataOptions()), FeedbackRow(messages[:1], messages[1:], True, "log:1")
        )
        assert isinstance(sample, TokenizedSample)
        spoken = sample.input_ids[sample.completion_mask.index(True) :]
        assert not tokenizer.convert_ids_to_tokens(spoken[0]).startswith("▁")
        assert tokenizer.decode(spoken).startswith(typed)
        assert tokenizer.eos_token_id not in spoken[:-1]


def test_an_unknown_letter_at_the_end_of_an_answer_does_not_end_it() -> None:
    tokenizer = tokenizers("SentencePiece, no bytes")["plain"]
    messages = said("Hi?", "Hello 😀")
    sample = tokenized_row(
        RowTokenizer(tokenizer, DataOptions()), FeedbackRow(messages[:1], messages[1:], True, "log:1")
    )
    assert isinstance(sample, TokenizedSample)
    assert sample.input_ids[-2:] == [tokenizer.unk_token_id, tokenizer.eos_token_id]


BEGUN = [*said("What is the capital of France?"), {"role": "assistant", "content": "It is"}]
GOING_ON = [{"role": "assistant", "content": " Paris."}]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", ["bytes", "SentencePiece, space at the beginning"])
def test_a_completion_goes_on_with_the_answer_that_the_prompt_ends_with_in_one_turn(kind: str, name: str) -> None:
    tokenizer = tokenizers(kind)[name]
    sample = tokenized_row(RowTokenizer(tokenizer, DataOptions()), FeedbackRow(BEGUN, GOING_ON, True, "log:1"))
    assert isinstance(sample, TokenizedSample)
    as_one = [*BEGUN[:1], {"role": "assistant", "content": "It is Paris."}]
    whole = tokenizer(tokenizer.apply_chat_template(as_one, tokenize=False), add_special_tokens=False)["input_ids"]
    start = sample.completion_mask.index(True)
    assert all(sample.completion_mask[start:])
    assert tokenizer.decode(sample.input_ids[start:]).removeprefix(" ").startswith("Paris.")
    ours = sample.input_ids[: -1 if sample.input_ids[-1] not in whole else None]
    assert ours == whole[: len(ours)]
    assert read(tokenizer, sample.input_ids[:start]).endswith("It is")


@pytest.mark.parametrize("name", ["ChatML", "Llama 3", "Qwen 3"])
def test_where_a_prompt_is_cut_the_beginning_of_the_answer_stays(name: str) -> None:
    tokenizer = tokenizers("bytes")[name]
    asked = [{"role": "user", "content": "word " * 100}, BEGUN[1]]
    for policy in ("keep_start", "keep_end"):
        options = DataOptions(max_length=70, long_prompts=policy)
        sample = tokenized_row(RowTokenizer(tokenizer, options), FeedbackRow(asked, GOING_ON, True, "log:1"))
        if isinstance(sample, LeftOut):
            assert (name, policy, sample.reason) == ("Qwen 3", "keep_start", NO_ROOM_FOR_PROMPT)
        else:
            assert "It is Paris." in tokenizer.decode(sample.input_ids)


CALL = {"function": {"name": "f", "arguments": {}}}


@pytest.mark.parametrize(
    ("begun", "going_on", "template"),
    [
        ({"tool_calls": [CALL]}, {}, "ChatML"),
        ({}, {"reasoning_content": "hm"}, "ChatML"),
        ({"name": "Ada"}, {"name": "Bob"}, "ChatML"),
        ({}, {}, "{% for m in messages %}{{ m['role'] }}{% endfor %}"),
        ({}, {}, "{% for m in messages %}{{ m['content'] }}{{ m['content'] }}{% endfor %}"),
        ({}, {}, "{% for m in messages %}{{ m['content'][5:] }}{% endfor %}"),
    ],
)
def test_what_cannot_go_on_with_the_prompts_last_message_is_refused_in_words(
    begun: Message, going_on: Message, template: str
) -> None:
    tokenizer = made_tokenizer("bytes", TEMPLATES[template][0] if template in TEMPLATES else template)
    row = FeedbackRow([BEGUN[0], {**BEGUN[1], **begun}], [{**GOING_ON[0], **going_on}], True, "log:1")
    with pytest.raises(FeedbackRowError, match=r"log:1: expected a completion that goes on with the"):
        tokenized_row(RowTokenizer(tokenizer, DataOptions()), row)


def test_loss_on_all_turns_leaves_out_the_beginning_of_an_answer_that_the_prompt_holds() -> None:
    row = row_of({"prompt": BEGUN, "completion": GOING_ON, "label": True}, RowFormat(loss_on="all_turns"))
    assert (row.prompt, row.completion) == (BEGUN, GOING_ON)


def test_a_tool_call_may_follow_what_the_answer_begins_with() -> None:
    template = (
        "{% for m in messages %}{{ m['content'] }}{% for call in m['tool_calls'] or [] %}{{ call['function']['name'] }}"
        "{% endfor %}</s>{% endfor %}"
    )
    tokenizer = made_tokenizer("bytes", template)
    row = FeedbackRow(BEGUN, [{"role": "assistant", "content": "", "tool_calls": [CALL]}], True, "log:1")
    sample = tokenized_row(RowTokenizer(tokenizer, DataOptions()), row)
    assert isinstance(sample, TokenizedSample)
    assert tokenizer.decode(sample.input_ids) == f"{BEGUN[0]['content']}</s>It isf</s>"
    assert sum(sample.completion_mask) == len(tokenizer("f</s>", add_special_tokens=False)["input_ids"])
