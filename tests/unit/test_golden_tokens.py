"""Whole rows come out as the token ids that someone writes who reads the chat template and counts by hand."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from bco_lightning.batch import FeedbackRow, LeftOut, TokenizedSample
from bco_lightning.data.options import DataOptions
from bco_lightning.data.tokenize import RowTokenizer
from bco_lightning.errors import FeedbackRowError
from tests.conftest import tokenized_row
from tests.reliability.tiny_run import byte_tokenizer

# In the manner of Llama 3: headers, a BOS token, tools in the first user message, calls as JSON that end in <|eom_id|>.
LLAMA_LIKE = """\
{{- bos_token }}
{%- for m in messages %}
    {%- set role = 'ipython' if m['role'] == 'tool' else m['role'] %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}
    {%- if loop.first and tools %}
        {{- 'Functions: ' + tools | map('tojson') | join(', ') + '\n\n' }}
    {%- endif %}
    {%- if m['tool_calls'] is defined %}
        {%- set call = m['tool_calls'][0]['function'] %}
        {{- '{"name": "' + call['name'] + '", "parameters": ' + call['arguments'] | tojson + '}<|eom_id|>' }}
    {%- elif m['role'] == 'tool' %}
        {{- m['content'] | tojson + '<|eot_id|>' }}
    {%- else %}
        {{- m['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
# In the manner of Qwen 3: thoughts of earlier turns are taken out, an answer without any begins with an empty thought,
# calls stand in tags, and the results of several tools share a user turn.
QWEN_LIKE = """\
{%- set start, end = '<|im_start|>', '<|im_end|>\n' %}
{%- set first_is_system = messages[0]['role'] == 'system' %}
{%- if tools %}
    {{- start + 'system\n' + (messages[0]['content'] + '\n\n' if first_is_system else '') + 'Tools:' }}
    {%- for tool in tools %}
        {{- '\n' + tool | tojson }}
    {%- endfor %}
    {{- end }}
{%- elif first_is_system %}
    {{- start + 'system\n' + messages[0]['content'] + end }}
{%- endif %}
{%- set ns = namespace(asked=0) %}
{%- for m in messages %}
    {%- if m['role'] == 'user' %}
        {%- set ns.asked = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- set content = m['content'] if m['content'] is string else '' %}
    {%- if m['role'] == 'user' %}
        {{- start + 'user\n' + content + end }}
    {%- elif m['role'] == 'assistant' %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- start + 'assistant\n' }}
        {%- if loop.index0 > ns.asked and (loop.last or thought) %}
            {{- '<think>\n' + thought + '\n</think>\n\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in m['tool_calls'] or [] %}
            {%- if content or not loop.first %}
                {{- '\n' }}
            {%- endif %}
            {{- '<tool_call>\n{"name": "' + call['function']['name'] + '", "arguments": ' }}
            {{- call['function']['arguments'] | tojson + '}\n</tool_call>' }}
        {%- endfor %}
        {{- end }}
    {%- elif m['role'] == 'tool' %}
        {%- if loop.previtem['role'] != 'tool' %}
            {{- start + 'user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' + content + '\n</tool_response>' }}
        {%- if loop.last or loop.nextitem['role'] != 'tool' %}
            {{- end }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- start + 'assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""
LLAMA_MARKUP = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"]
QWEN_MARKUP = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]


@pytest.fixture(scope="module")
def llama_like() -> Any:
    """One token for each byte; begins every text with a BOS token of its own."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(name, special=True) for name in LLAMA_MARKUP], special_tokens=True)
    tokenizer.bos_token, tokenizer.eos_token = "<|begin_of_text|>", "<|eot_id|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = LLAMA_LIKE
    return tokenizer


@pytest.fixture(scope="module")
def qwen_like() -> Any:
    """One token for each byte; tags are tokens, but none that decoding leaves out."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in QWEN_MARKUP])
    tokenizer.chat_template = QWEN_LIKE
    return tokenizer


# Ids of the byte tokenizer: 256 bytes in the order of their letters in byte-level BPE, then control tokens as added.
BYTES = {chr(33 + number): number for number in range(94)} | {"\n": 198, " ": 220}
NUMBERS = {"<|im_start|>": 256, "<|im_end|>": 257, "<pad>": 258}
LLAMA_NUMBERS = NUMBERS | {name: 259 + number for number, name in enumerate(LLAMA_MARKUP)}
QWEN_NUMBERS = NUMBERS | {name: 259 + number for number, name in enumerate(QWEN_MARKUP)}


def written(numbers: dict[str, int], *pieces: str) -> list[int]:
    """Ids of control tokens and texts, one after the other."""
    return [number for piece in pieces for number in ([numbers[piece]] if piece in numbers else map(BYTES.get, piece))]


def tokenized(tokenizer: Any, row: FeedbackRow, **limits: Any) -> tuple[list[int], list[int]]:
    """What carries no loss, and what does after it."""
    sample = tokenized_row(RowTokenizer(tokenizer, DataOptions(**limits)), row)
    assert isinstance(sample, TokenizedSample)
    first = sample.completion_mask.index(True)
    assert all(sample.completion_mask[first:])
    return sample.input_ids[:first], sample.input_ids[first:]


def conversation(*messages: tuple[str, Any], **more: Any) -> FeedbackRow:
    """A row of (role, what is said) whose last message is rated; calls of tools are given as dictionaries."""
    made = [
        {"role": role, "content": said}
        if isinstance(said, str)
        else {"role": role, "tool_calls": [{"type": "function", "function": call} for call in said]}
        for role, said in messages
    ]
    return FeedbackRow(made[:-1], made[-1:], True, "log.jsonl:1", **more)


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {}}}
WEATHER_JSON = '{"type": "function", "function": {"name": "weather", "parameters": {}}}'
CALL = {"name": "weather", "arguments": {"city": "Rome"}}


# SmolLM2's own template and vocabulary; written down from what the tokenizers library says of each piece.
BE_KIND = [1, 9690, 198, 6077, 1942, 30, 2, 198]
HI = [1, 4093, 198, 26843, 47, 2, 198]
HELLO = [1, 520, 9531, 198, 19556, 665, 30, 2, 198]
ASSISTANT = [1, 520, 9531, 198]


def test_smollm2_system_prompt_and_several_turns(tokenizer: Any) -> None:
    row = conversation(
        ("system", "Be kind."), ("user", "Hi?"), ("assistant", "Hello there."), ("user", "Hi?"), ("assistant", "Yes.")
    )
    assert tokenized(tokenizer, row) == ([*BE_KIND, *HI, *HELLO, *HI, *ASSISTANT], [10539, 30, 2])


def test_smollm2_writes_its_own_system_prompt_where_there_is_none(tokenizer: Any) -> None:
    said = [2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182]
    own = [1, 9690, 198, *said, 2, 198]
    assert tokenized(tokenizer, conversation(("user", "Hi?"), ("assistant", "Yes."))) == (
        [*own, *HI, *ASSISTANT],
        [10539, 30, 2],
    )


ONE_TO_SIX = [1, 4093, 198, 537, 827, 1296, 1876, 2531, 2976, 2, 198]  # the user says: one two three four five six
COUNTED = conversation(("system", "Be kind."), ("user", "one two three four five six"), ("assistant", "Hello there."))


def test_smollm2_cut_prompt_that_keeps_its_end(tokenizer: Any) -> None:
    limits = {"max_length": 21, "max_prompt_length": 17, "long_prompts": "keep_end"}
    assert tokenized(tokenizer, COUNTED, **limits) == ([*BE_KIND, 1876, 2531, 2976, 2, 198, *ASSISTANT], HELLO[4:8])


def test_smollm2_cut_prompt_that_keeps_its_start(tokenizer: Any) -> None:
    limits = {"max_length": 22, "max_prompt_length": 18, "long_prompts": "keep_start"}
    kept = [*BE_KIND, 1, 4093, 198, 537, 2, 198, *ASSISTANT]
    assert tokenized(tokenizer, COUNTED, **limits) == (kept, HELLO[4:8])


def test_smollm2_cut_completion_has_no_end_token(tokenizer: Any) -> None:
    whole = [*BE_KIND, *ONE_TO_SIX, *ASSISTANT]
    for room in (1, 2, 3):
        limits = {"max_length": len(whole) + room, "max_prompt_length": len(whole)}
        assert tokenized(tokenizer, COUNTED, **limits) == (whole, [19556, 665, 30][:room])


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"max_prompt_length": 22, "long_prompts": "drop"}, "prompt over data.max_prompt_length"),
        ({"max_length": 26, "long_prompts": "drop"}, "prompt too long (data.max_length)"),
        (
            {"max_length": 26, "max_prompt_length": 23, "long_completions": "drop"},
            "completion too long (data.max_length)",
        ),
    ],
)
def test_smollm2_row_one_token_over_a_limit_is_left_out(tokenizer: Any, limits: dict[str, Any], reason: str) -> None:
    one_more = {name: value + 1 if isinstance(value, int) else value for name, value in limits.items()}
    assert tokenized_row(RowTokenizer(tokenizer, DataOptions(**limits)), COUNTED) == LeftOut("log.jsonl:1", reason)
    assert tokenized(tokenizer, COUNTED, **one_more) == ([*BE_KIND, *ONE_TO_SIX, *ASSISTANT], HELLO[4:8])


def header(role: str) -> list[str]:
    return ["<|start_header_id|>", role, "<|end_header_id|>", "\n\n"]


def test_llama_like_conversation_begins_with_one_bos_and_is_trimmed(llama_like: Any) -> None:
    row = conversation(("system", "Be kind."), ("user", " Hi? "), ("assistant", "Yes. "))
    start = ["<|begin_of_text|>", *header("system"), "Be kind.", "<|eot_id|>"]
    assert tokenized(llama_like, row) == (
        written(LLAMA_NUMBERS, *start, *header("user"), "Hi?", "<|eot_id|>", *header("assistant")),
        written(LLAMA_NUMBERS, "Yes.", "<|eot_id|>"),
    )


def test_llama_like_tool_call_carries_loss_up_to_its_own_end_token(llama_like: Any) -> None:
    row = conversation(("user", "Rome?"), ("assistant", [CALL]), tools=[WEATHER, WEATHER])
    functions = f"Functions: {WEATHER_JSON}, {WEATHER_JSON}\n\n"
    assert tokenized(llama_like, row) == (
        written(
            LLAMA_NUMBERS,
            "<|begin_of_text|>", *header("user"), functions, "Rome?", "<|eot_id|>", *header("assistant"),
        ),
        written(LLAMA_NUMBERS, '{"name": "weather", "parameters": {"city": "Rome"}}', "<|eom_id|>"),
    )  # fmt: skip


def test_llama_like_answer_to_what_a_tool_gave_back(llama_like: Any) -> None:
    row = conversation(("user", "Rome?"), ("assistant", [CALL]), ("tool", 'It says "sun".'), ("assistant", "Sun."))
    call = '{"name": "weather", "parameters": {"city": "Rome"}}'
    assert tokenized(llama_like, row) == (
        written(
            LLAMA_NUMBERS,
            "<|begin_of_text|>", *header("user"), "Rome?", "<|eot_id|>", *header("assistant"), call, "<|eom_id|>",
            *header("ipython"), '"It says \\"sun\\"."', "<|eot_id|>", *header("assistant"),
        ),
        written(LLAMA_NUMBERS, "Sun.", "<|eot_id|>"),
    )  # fmt: skip


def test_llama_like_cuts(llama_like: Any) -> None:
    row = conversation(("user", "q" * 50 + "last"), ("assistant", "Yes."))
    ask = ["<|eot_id|>", *header("assistant")]
    answer = written(LLAMA_NUMBERS, "Yes.", "<|eot_id|>")
    keep_end = written(LLAMA_NUMBERS, "<|begin_of_text|>", "qqlast", *ask)
    keep_start = written(LLAMA_NUMBERS, "<|begin_of_text|>", *header("user"), "qq", *ask)
    limits = {"max_prompt_length": len(keep_end), "long_prompts": "keep_end"}
    assert tokenized(llama_like, row, **limits) == (keep_end, answer)
    limits = {"max_prompt_length": len(keep_start), "long_prompts": "keep_start"}
    assert tokenized(llama_like, row, **limits) == (keep_start, answer)


def qwen(*pieces: str) -> list[int]:
    return written(QWEN_NUMBERS, *pieces)


def turn(role: str, *pieces: str) -> list[str]:
    return ["<|im_start|>", f"{role}\n", *pieces, "<|im_end|>", "\n"]


ASK = ["<|im_start|>", "assistant\n"]
NO_THOUGHT = ["<think>", "\n\n", "</think>", "\n\n"]


def test_qwen_like_answer_begins_with_an_empty_thought_and_earlier_thoughts_are_gone(qwen_like: Any) -> None:
    row = conversation(
        ("user", "Hi?"), ("assistant", "<think>\nhm\n</think>\n\nYes."), ("user", "So?"), ("assistant", "Well.")
    )
    prompt = [*turn("user", "Hi?"), *turn("assistant", "Yes."), *turn("user", "So?"), *ASK]
    assert tokenized(qwen_like, row) == (qwen(*prompt), qwen(*NO_THOUGHT, "Well.", "<|im_end|>"))


def test_qwen_like_thought_of_the_rated_turn_carries_loss(qwen_like: Any) -> None:
    row = conversation(("user", "Hi?"), ("assistant", "<think>\nhm\n</think>\n\nYes."))
    said = ["<think>", "\nhm\n", "</think>", "\n\nYes.", "<|im_end|>"]
    assert tokenized(qwen_like, row) == (qwen(*turn("user", "Hi?"), *ASK), qwen(*said))


def test_qwen_like_empty_thought_belongs_to_the_prompt_where_thinking_is_off(qwen_like: Any) -> None:
    row = conversation(("user", "Hi?"), ("assistant", "Yes."), template_options={"enable_thinking": False})
    assert tokenized(qwen_like, row) == (qwen(*turn("user", "Hi?"), *ASK, *NO_THOUGHT), qwen("Yes.", "<|im_end|>"))


def test_qwen_like_tool_calls_carry_loss(qwen_like: Any) -> None:
    row = conversation(
        ("system", "Be kind."), ("user", "Rome?"), ("assistant", [CALL, CALL]), tools=[WEATHER],
        template_options={"enable_thinking": False},
    )  # fmt: skip
    call = ["<tool_call>", '\n{"name": "weather", "arguments": {"city": "Rome"}}\n', "</tool_call>"]
    prompt = [*turn("system", "Be kind.\n\n", "Tools:\n", WEATHER_JSON), *turn("user", "Rome?"), *ASK, *NO_THOUGHT]
    assert tokenized(qwen_like, row) == (qwen(*prompt), qwen(*call, "\n", *call, "<|im_end|>"))


def test_qwen_like_results_of_several_tools_share_a_turn(qwen_like: Any) -> None:
    row = conversation(
        ("user", "Rome?"), ("assistant", [CALL]), ("tool", "sun"), ("tool", "rain"), ("assistant", "Both.")
    )
    call = ["<tool_call>", '\n{"name": "weather", "arguments": {"city": "Rome"}}\n', "</tool_call>"]
    results = [
        "<tool_response>",
        "\nsun\n",
        "</tool_response>",
        "\n",
        "<tool_response>",
        "\nrain\n",
        "</tool_response>",
    ]
    prompt = [*turn("user", "Rome?"), *turn("assistant", *call), *turn("user", *results), *ASK]
    assert tokenized(qwen_like, row) == (qwen(*prompt), qwen(*NO_THOUGHT, "Both.", "<|im_end|>"))


def test_qwen_like_loss_on_all_turns_between_which_tools_speak(qwen_like: Any) -> None:
    row = conversation(
        ("user", "Rome?"), ("assistant", "<think>a</think>Look."), ("tool", "sun"), ("tool", "rain"),
        ("assistant", "Both."),
    )  # fmt: skip
    row = FeedbackRow(row.prompt[:1], row.prompt[1:] + row.completion, True, "log.jsonl:1")
    sample = tokenized_row(RowTokenizer(qwen_like, DataOptions()), row)
    assert isinstance(sample, TokenizedSample)
    said = [
        qwen("<think>", "\na\n", "</think>", "\n\nLook.", "<|im_end|>"),
        qwen(*NO_THOUGHT, "Both.", "<|im_end|>"),
    ]
    results = [
        "<tool_response>",
        "\nsun\n",
        "</tool_response>",
        "\n",
        "<tool_response>",
        "\nrain\n",
        "</tool_response>",
    ]
    between = qwen("\n", *turn("user", *results), *ASK)
    asked = qwen(*turn("user", "Rome?"), *ASK)
    assert sample.input_ids == [*asked, *said[0], *between, *said[1]]
    expected = [(asked, False), (said[0], True), (between, False), (said[1], True)]
    assert sample.completion_mask == [loss for ids, loss in expected for _ in ids]


def test_qwen_like_loss_on_all_turns_is_refused_where_an_earlier_turn_is_rewritten(qwen_like: Any) -> None:
    talk = conversation(("user", "Hi?"), ("assistant", "Yes."), ("user", "So?"), ("assistant", "Well."))
    row = FeedbackRow(talk.prompt[:1], talk.prompt[1:] + talk.completion, True, "log.jsonl:1")
    with pytest.raises(FeedbackRowError, match=r"log\.jsonl:1: expected a chat template that extends .*one that rewri"):
        tokenized_row(RowTokenizer(qwen_like, DataOptions()), row)
