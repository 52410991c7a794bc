"""Messages of every layout come to one form."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bco_lightning.data.messages import check_size, messages_in, out_of_text
from bco_lightning.data.values import value_at, without_nulls
from bco_lightning.errors import FeedbackRowError
from tests.unit.made_rows import made, row_of


def read(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    return messages_in(list(messages), "messages", "x:1")


def test_parts_of_a_text_are_joined() -> None:
    parts = [{"type": "text", "text": "a "}, "b", {"type": "input_text", "text": " c"}]
    assert read({"role": "user", "content": parts}) == [{"role": "user", "content": "a b c"}]


def test_a_developer_speaks_as_the_system() -> None:
    assert read({"role": "developer", "content": "a"}) == [{"role": "system", "content": "a"}]


@pytest.mark.parametrize("role", ["system", "tool"])
def test_systems_and_tools_may_say_nothing(role: str) -> None:
    assert read({"role": role, "content": ""}) == [{"role": role, "content": ""}]


@pytest.mark.parametrize("message", [{"content": ""}, {"content": None}, {}])
def test_a_tool_call_needs_no_text(message: dict[str, Any]) -> None:
    call = {"function": {"name": "f", "arguments": {}}}
    assert read({"role": "assistant", "tool_calls": [call], **message})[0]["content"] == ""


@pytest.mark.parametrize("arguments", ["{", "[1]", "3", ""])
def test_arguments_that_are_no_json_object_stay_as_the_model_wrote_them(arguments: str) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    assert read({"role": "assistant", "tool_calls": [call]})[0]["tool_calls"] == [call]


def test_a_call_without_a_wrapper_is_understood() -> None:
    [message] = read({"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"a": 1}'}]})
    assert message["tool_calls"] == [{"name": "f", "arguments": {"a": 1}}]


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "name"])
def test_other_keys_are_passed_through(key: str) -> None:
    assert read({"role": "assistant", "content": "a", key: "b"}) == [{"role": "assistant", "content": "a", key: "b"}]


def test_an_empty_list_of_tool_calls_is_none() -> None:
    assert read({"role": "user", "content": "a", "tool_calls": []}) == [{"role": "user", "content": "a"}]


def test_the_given_messages_stay_as_they_are() -> None:
    given = {"role": "developer", "content": [{"type": "text", "text": "a"}], "tool_calls": []}
    before = json.dumps(given)
    read(given)
    assert json.dumps(given) == before


def test_keys_without_a_value_are_gone_at_every_depth_but_list_items_stay() -> None:
    assert without_nulls({"a": None, "b": [None, {"c": None, "d": 0}]}) == {"b": [None, {"d": 0}]}


def nested(depth: int) -> Any:
    return json.loads("[" * depth + "]" * depth)


def test_nesting_is_limited() -> None:
    check_size([{"role": "user", "content": "a", "x": nested(30)}], "x:1")
    with pytest.raises(FeedbackRowError, match="at most 32 levels of nesting in a message, found more"):
        check_size(read({"role": "user", "content": "a", "x": nested(500)}), "x:1")


def test_characters_of_keys_and_values_are_limited() -> None:
    check_size([{"role": "user", "content": "x" * 1_000_000}], "x:1")
    for parts in ([{"role": "user", "content": "x" * 1_000_001}], [{"k" * 600_000: "x" * 600_000}]):
        with pytest.raises(FeedbackRowError, match="at most 1,000,000 characters"):
            check_size(parts, "x:1")


CALL = {"name": "f", "arguments": {"a": 1}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}


@pytest.mark.parametrize(("given", "message"), [
    ({"from": "human", "value": "a"}, {"role": "user", "content": "a"}),
    ({"from": "gpt", "value": "a"}, {"role": "assistant", "content": "a"}),
    ({"from": "function_call", "value": json.dumps(CALL)}, CALLED),
    ({"role": "tool_call", "content": json.dumps([CALL, CALL])}, {**CALLED, "tool_calls": [CALL, CALL]}),
    ({"from": "observation", "value": "1"}, {"role": "tool", "content": "1"}),
    ({"role": "function", "name": "f", "content": "1"}, {"role": "tool", "name": "f", "content": "1"}),
    ({"role": "assistant", "content": None, "function_call": {**CALL, "arguments": '{"a": 1}'}}, CALLED),
    ({"role": "assistant", "tool_calls": json.dumps([CALL])}, CALLED),
    ({"role": "assistant", "tool_calls": [json.dumps(CALL)]}, CALLED),
    ({"role": "model", "parts": [{"text": "a"}, {"text": "b"}]}, {"role": "assistant", "content": "ab"}),
    ({"role": "Assistant", "content": "a"}, {"role": "assistant", "content": "a"}),
    ({"role": "USER", "content": "a"}, {"role": "user", "content": "a"}),
    ({"role": "tool", "content": {"result": [1, "ß"]}}, {"role": "tool", "content": '{"result": [1, "ß"]}'}),
    ({"role": "tool", "content": [1, {"a": 2}]}, {"role": "tool", "content": '[1, {"a": 2}]'}),
    ({"role": "tool", "content": {"text": "a", "n": 1}}, {"role": "tool", "content": '{"text": "a", "n": 1}'}),
    ({"role": "tool", "content": [{"type": "text", "text": "a"}, "b"]}, {"role": "tool", "content": "ab"}),
    ({"role": "tool", "content": {"type": "text", "text": "a"}}, {"role": "tool", "content": "a"}),
    ({"role": "user", "content": {"type": "text", "text": "a"}}, {"role": "user", "content": "a"}),
    ({"role": "user", "content": '[{"type": "text", "text": "a"}]'}, {"role": "user", "content": "a"}),
    ({"role": "user", "content": '[{"type": "text"}]'}, {"role": "user", "content": '[{"type": "text"}]'}),
])  # fmt: skip
def test_messages_of_other_tools_come_to_one_form(given: dict[str, Any], message: dict[str, Any]) -> None:
    assert read(given) == [message]
    assert messages_in([json.dumps(given)], "messages", "x:1") == [message]


@pytest.mark.parametrize(("given", "found"), [
    ({"role": "narrator", "content": "a"}, "'role' out of system, user, assistant, tool, or .*, found \"narrator\""),
    ({"role": None, "content": "a"}, "'role' out of .* found null"),
    ({"speaker": "ann", "text": "a"}, "'role' out of .* found the keys 'speaker', 'text'"),
    ({"role": "user", "message": "a"}, "must have a text 'content', found none"),
    ({"role": "user", "content": 7}, "must have a text 'content', found 7"),
    ({"role": "user", "content": {"result": 1}}, "must have text parts as its content, found an object of 1"),
    ({"from": "function_call", "value": "f(1)"}, "must have a list of function calls"),
    ("Hello", "must be an object with 'role' and 'content', found \"Hello\""),
])  # fmt: skip
def test_a_message_that_is_not_understood_is_named_by_what_was_found(given: Any, found: str) -> None:
    with pytest.raises(
        FeedbackRowError,
        match=f"x:1: message 1 of 'messages' {'' if found.startswith('must') else 'must have a '}{found}",
    ):
        read(given)


ASKED, ANSWERED = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]


@pytest.mark.parametrize("write", [
    lambda messages: messages,
    json.dumps,
    lambda messages: json.dumps(messages, indent=1) + "\n",
    lambda messages: list(map(json.dumps, messages)),
    lambda messages: json.dumps(list(map(json.dumps, messages))),
    lambda messages: messages[0],
    lambda messages: json.dumps(messages[0]),
    lambda messages: json.dumps([{"from": message["role"], "value": message["content"]} for message in messages]),
], ids=["list", "text", "long text", "texts", "text of texts", "object", "text of an object", "ShareGPT"])  # fmt: skip
def test_messages_are_the_same_however_they_are_written_in_a_column(write: Any) -> None:
    row = row_of({"prompt": write(ASKED), "completion": write(ANSWERED), "label": 1})
    assert (row.prompt, row.completion) == (ASKED, ANSWERED)
    better, worse = made({"prompt": write(ASKED), "chosen": write(ANSWERED), "rejected": "c"})
    assert (better.prompt, better.completion) == (ASKED, ANSWERED)  # type: ignore[union-attr]
    assert worse.prompt == ASKED  # type: ignore[union-attr]


@pytest.mark.parametrize("text", [
    "[1, 2, 3]", "[]", "{}", '{"a": 1}', '[{"role": "admin", "name": "x"}]', '["a", "b"]', "[INST] a [/INST]", "[{",
    '[{"value": 1,}]', '{"role": 3, "content": "a"}', '"[]"', "[[[[",
])  # fmt: skip
def test_a_text_that_merely_looks_like_json_stays_what_it_is(text: str) -> None:
    row = row_of({"prompt": text, "completion": f"{text} ", "label": 1})
    assert (row.prompt[0]["content"], row.completion[0]["content"]) == (text, f"{text} ")


@pytest.mark.parametrize("text", [
    str([{"role": "user", "content": "my secret"}]), str([{"content": "my secret", "role": "user"}]),
    json.dumps([{"role": "user", "content": "my secret"}])[:-4], "[{'from': 'human', 'value': 'my secret'}\n {}]",
])  # fmt: skip
def test_messages_that_are_no_json_are_not_trained_on_as_text(text: str) -> None:
    with pytest.raises(FeedbackRowError, match="'prompt' must hold messages as JSON, found them cut off or") as caught:
        row_of({"prompt": text, "completion": "b", "label": 1})
    assert "secret" not in str(caught.value)


HH = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c "
TRANSCRIPTS: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "of people": (
        f"{HH}\n\nAssistant: d\ne",
        [("user", "a"), ("assistant", "b"), ("user", "c "), ("assistant", "d\ne")],
    ),
    "that asks for an answer": (f"{HH}\n\nAssistant: ", [("user", "a"), ("assistant", "b"), ("user", "c ")]),
    "without a space": ("\n\nHuman:a\n\nAssistant:b", [("user", "a"), ("assistant", "b")]),
    "of steered answers": (
        "a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc\n<extra_id_1>Assistant\n",
        [("user", "a"), ("assistant", "b"), ("user", "c")],
    ),
}


@pytest.mark.parametrize(("text", "turns"), TRANSCRIPTS.values(), ids=TRANSCRIPTS)
def test_a_transcript_is_read_as_its_turns(text: str, turns: list[tuple[str, str]]) -> None:
    said = messages_in(out_of_text(text, "prompt", "x:1"), "prompt", "x:1", "user")
    assert [(message["role"], message["content"]) for message in said] == turns


@pytest.mark.parametrize(
    "text",
    ["Human: a\n\nAssistant: b", "See:\n\nHuman: a", "\n\nAssistant: a", "a <extra_id_1>Assistant b", "\n\nHuman"],
)
def test_a_text_that_only_mentions_turns_is_text(text: str) -> None:
    assert out_of_text(text, "prompt", "x:1") == text


def test_a_whole_transcript_of_which_the_last_turn_is_rated_is_a_row() -> None:
    row = row_of({"messages": f"{HH}\n\nAssistant: d", "label": True})
    assert [message["content"] for message in row.prompt + row.completion] == ["a", "b", "c ", "d"]


REACHED: list[tuple[Any, str, Any]] = [
    ({"a": [{"b": 1}, {"b": 2}]}, "a[0].b", 1), ({"a": [{"b": 1}, {"b": 2}]}, "a[-1].b", 2),
    ({"a": '{"choices": [{"message": {"content": "x"}}]}'}, "a.choices[0].message.content", "x"),
    ({"a": {"b": '["x", "y"]'}}, "a.b[1]", "y"), ({"a[0]": 3}, "a[0]", 3), ({"a": {"b.c": 4}}, "a.b.c", 4),
    ({"a": [[5]]}, "a[0][0]", 5),
    *((record, name, None) for record, name in [
        ({"a": [1]}, "a[1]"), ({"a": [1]}, "a[-2]"), ({"a": "x"}, "a.b"), ({"a": "[1"}, "a[0]"),
        ({"a": {"b": 1}}, "a[0]"),
        ({"a": [1]}, "a.0"), ({"a": [1]}, "a["), ({"a": [1]}, "[0]"), ({"a": 1}, "."), ({"a": None}, "a.b"),
        ({"a": [1]}, "a[99999999999]"),
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("record", "name", "value"), REACHED, ids=[name for _, name, _ in REACHED])
def test_a_name_reaches_into_objects_lists_and_json_text(record: Any, name: str, value: Any) -> None:
    assert value_at(record, name) == value


def test_a_completion_that_is_the_whole_conversation_is_one() -> None:
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}]
    row = row_of({"prompt": "q", "completion": talk, "label": True})
    assert (row.prompt, row.completion) == (talk[:1], talk[1:])
    [error] = made({"prompt": "r", "completion": talk, "label": True})
    assert "expected 'prompt' to be a message of the conversations, found another text" in str(error)


@pytest.mark.parametrize(
    ("role", "known"),
    [("human", "user"), ("prompter", "user"), ("gpt", "assistant"), ("model", "assistant"), ("bot", "assistant")],
)
def test_a_single_message_of_sharegpt_is_one_whatever_its_role_is_called(role: str, known: str) -> None:
    [message] = messages_in({"from": role, "value": "x"}, "prompt", "x:1", "user")
    assert message == {"role": known, "content": "x"}
