"""A rated completion, in columns of its own or as the last turn of a conversation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from bco_lightning.batch import FeedbackRow
from bco_lightning.data.feedback_row import Columns
from bco_lightning.data.formats.record_format import Candidate
from bco_lightning.data.parsing import RecordParser
from bco_lightning.data.records import read_records
from bco_lightning.data.source import Rating, RowFormat
from bco_lightning.errors import FeedbackRowError

CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Bremen", "unit": null}'},
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def turn(role: str, content: Any = "...", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def parse(record: dict[str, Any], options: RowFormat | None = None) -> FeedbackRow:
    """The row of a record that has a label."""
    parser = RecordParser(options or RowFormat("unpaired"))
    [item] = parser.candidates(record, "log.jsonl:7")
    if isinstance(item, FeedbackRowError):
        raise item
    assert isinstance(item, Candidate)
    row = parser.rated(item)
    assert isinstance(row, FeedbackRow)
    return row


def talk(*messages: dict[str, Any], loss_on: Any = "rated_turn", **more: Any) -> FeedbackRow:
    return parse({"messages": list(messages), "label": True, **more}, RowFormat("unpaired", loss_on=loss_on))


def roles(row: FeedbackRow) -> tuple[list[str], list[str]]:
    return [message["role"] for message in row.prompt], [message["role"] for message in row.completion]


def test_the_last_assistant_turn_of_a_conversation_is_rated() -> None:
    row = talk(
        turn("system", "Be brief."),
        turn("user", "a"),
        turn("assistant", "b"),
        turn("user", "c"),
        turn("assistant", "d"),
    )
    assert roles(row) == (["system", "user", "assistant", "user"], ["assistant"])
    assert row.completion == [{"role": "assistant", "content": "d"}]
    assert row.num_trailing == 0


def test_messages_after_the_rated_turn_are_counted() -> None:
    row = talk(turn("user"), turn("assistant", "b"), turn("user", "Thanks!"), turn("user", "Bye!"))
    assert row.completion == [{"role": "assistant", "content": "b"}]
    assert row.num_trailing == 2


def test_tool_calls_and_their_results_belong_to_the_turn() -> None:
    row = talk(
        turn("user"),
        turn("assistant", None, tool_calls=[CALL]),
        turn("tool", "rain", tool_call_id="c1"),
        turn("assistant"),
    )
    assert roles(row) == (["user"], ["assistant", "tool", "assistant"])


def test_a_result_that_nobody_answered_comes_after_the_turn() -> None:
    row = talk(turn("user"), turn("assistant", None, tool_calls=[CALL]), turn("tool", "rain"))
    assert roles(row) == (["user"], ["assistant"])
    assert row.num_trailing == 1


def test_all_turns_begin_with_the_first_answer() -> None:
    row = talk(turn("system"), turn("user"), turn("assistant"), turn("user"), turn("assistant"), loss_on="all_turns")
    assert roles(row) == (["system", "user"], ["assistant", "user", "assistant"])


def test_all_turns_leave_a_greeting_in_the_prompt() -> None:
    row = talk(turn("assistant"), turn("user"), turn("assistant"), loss_on="all_turns")
    assert roles(row) == (["assistant", "user"], ["assistant"])


def test_all_turns_reach_into_a_prompt_column() -> None:
    record = {"prompt": [turn("user"), turn("assistant"), turn("user")], "completion": "d", "label": True}
    assert roles(parse(record, RowFormat(loss_on="all_turns"))) == (["user"], ["assistant", "user", "assistant"])
    assert roles(parse(record)) == (["user", "assistant", "user"], ["assistant"])


@pytest.mark.parametrize("column", ["messages", "conversation", "conversations", "chat"])
def test_conversations_are_found_under_their_usual_names(column: str) -> None:
    record = {column: [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "label": 1}
    assert parse(record).prompt == [{"role": "user", "content": "a"}]
    assert parse(record).completion == [{"role": "assistant", "content": "b"}]


def test_a_named_column_comes_before_prompt_and_completion() -> None:
    record = {"prompt": "a", "completion": "b", "turns": [turn("user", "c"), turn("assistant", "d")], "label": 1}
    assert parse(record, RowFormat(columns=Columns(messages="turns"))).completion[0]["content"] == "d"
    assert parse(record).completion[0]["content"] == "b"


def test_a_conversation_can_be_json_text_as_in_a_csv(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    messages = json.dumps([turn("user", "a"), turn("assistant", "b")]).replace('"', '""')
    log.write_text(f'messages,label\n"{messages}",1\n')
    [(_, record)] = read_records(str(log), "label")
    assert parse(dict(record)).completion == [{"role": "assistant", "content": "b"}]  # type: ignore[call-overload]


def test_keys_that_a_parquet_file_fills_up_are_gone(tmp_path: Path) -> None:
    messages = [turn("user", "a"), turn("assistant", None, tool_calls=[CALL]), turn("tool", "rain", tool_call_id="c1")]
    Dataset.from_list([{"messages": [*messages, turn("assistant", "b")], "label": True, "tools": TOOLS}]).to_parquet(
        tmp_path / "log.parquet"
    )
    [(_, record)] = read_records(str(tmp_path / "log.parquet"), "label")
    row = parse(dict(record))  # type: ignore[call-overload]
    assert row.prompt == [turn("user", "a")]
    call = {**CALL, "function": {"name": "weather", "arguments": {"city": "Bremen", "unit": None}}}
    assert row.completion == [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "rain", "tool_call_id": "c1"},
        {"role": "assistant", "content": "b"},
    ]
    assert row.tools == TOOLS


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_tools_are_a_list_or_its_json_text(tools: Any) -> None:
    assert talk(turn("user"), turn("assistant"), tools=tools).tools == TOOLS


@pytest.mark.parametrize("tools", [None, [], "", "null", "[]"])
def test_no_tools_are_none(tools: Any) -> None:
    assert talk(turn("user"), turn("assistant"), tools=tools).tools is None


@pytest.mark.parametrize("options", [None, {}, "", "null", "{}"])
def test_no_options_are_none(options: Any) -> None:
    assert talk(turn("user"), turn("assistant"), chat_template_kwargs=options).template_options == {}


@pytest.mark.parametrize("options", [{"enable_thinking": False, "x": None}, '{"enable_thinking": false}'])
def test_options_of_the_template_are_an_object_or_its_json_text(options: Any) -> None:
    row = talk(turn("user"), turn("assistant"), chat_template_kwargs=options)
    assert row.template_options == {"enable_thinking": False}


@pytest.mark.parametrize("name", ["chat_template", "messages", "tokenize", "add_generation_prompt", "eos_token"])
def test_a_row_cannot_bring_a_template_of_its_own(name: str) -> None:
    with pytest.raises(FeedbackRowError, match=f"must hold options of the template, found '{name}'"):
        talk(turn("user"), turn("assistant"), chat_template_kwargs={name: "{{ 1 }}"})


def test_names_with_dots_reach_into_objects() -> None:
    record = {"io": {"in": "a", "out": "b", "tools": TOOLS}, "feedback": {"score": 4, "clarity": 2}}
    columns = Columns(prompt="io.in", completion="io.out", label="feedback.score", tools="io.tools")
    row = parse(record, RowFormat(columns=columns, rating=Rating(up=4, down=3)))
    assert (row.prompt[0]["content"], row.completion[0]["content"], row.tools) == ("a", "b", TOOLS)
    assert row.thumbs_up is True
    assert parse(record, RowFormat(columns=columns, rating=Rating("feedback.clarity", up=4, down=3))).thumbs_up is False


def test_with_a_rule_that_names_a_column_no_label_is_needed() -> None:
    options = RowFormat(rating=Rating("stars", up=4, down=3))
    assert parse({"prompt": "a", "completion": "b", "stars": 5}, options).thumbs_up is True
    with pytest.raises(FeedbackRowError, match="expected a column 'label', found 'prompt', 'completion', 'stars'"):
        parse({"prompt": "a", "completion": "b", "stars": 5})


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([turn("user")], "'messages' must hold a message of the assistant, which is rated, found none"),
        ([turn("assistant")], "expected a prompt before what the assistant says, found none"),
        ([], "'messages' must be a list of chat messages, found an empty list"),
        ("hello", "'messages' must hold JSON, found"),
        ("3", "'messages' must be a list of chat messages, found a value of type int"),
        ([turn("user", " "), turn("assistant")], "'messages' must hold text, found nothing but white space"),
        ([turn("user"), turn("assistant", None)], "message 2 of 'messages' must have a text 'content'"),
        ([turn("user"), turn("assistant", 3)], "message 2 of 'messages' must have a text 'content'"),
        ([turn("user"), turn("function", "x"), turn("assistant")], "message 2 .* a 'role' out of system, user"),
        ([turn(["user"]), turn("assistant")], "message 1 of 'messages' must have"),
        ([{"from": "human"}, turn("assistant")], "message 1 of 'messages' must have"),
        ([None, turn("assistant")], "message 1 of 'messages' must have"),
        ([turn("user"), turn("assistant", None, tool_calls="x")], "message 2 .* a list of function calls"),
        ([turn("user"), turn("assistant", None, tool_calls=[{}])], "message 2 .* a list of function calls"),
        ([turn("user", tool_calls=[CALL]), turn("assistant")], "message 1 of 'messages' must be the assistant's"),
        (
            [turn("user", [{"type": "image_url"}]), turn("assistant")],
            'text parts as its content, found one of type "image_',
        ),
        ([turn("user", [7]), turn("assistant")], "must have text parts as its content, found 7"),
        ([turn("user", "a\x00"), turn("assistant")], "expected text, found a NUL character"),
        ([turn("user", x="\ud800"), turn("assistant")], "half of a surrogate pair"),
    ],
)
def test_a_malformed_conversation_is_named(messages: Any, message: str) -> None:
    with pytest.raises(FeedbackRowError, match=message) as caught:
        parse({"messages": messages, "label": True})
    assert caught.value.where == "log.jsonl:7"


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("tools", "[", "'tools' must hold JSON, found \"\\[\" that is none"),
        ("tools", {"a": 1}, "'tools' must be a list of JSON schemas, found an object of 1"),
        ("tools", ["a"], "'tools' must be a list of JSON schemas"),
        ("tools", [{"a": "\x00"}], "found a NUL character"),
        ("chat_template_kwargs", [1], "'chat_template_kwargs' must be an object, found a list of 1"),
        ("chat_template_kwargs", {"a": "\ud800"}, "half of a surrogate pair"),
        ("chat_template_kwargs", {"a": "x" * 1_000_001}, "at most 1,000,000 characters in a row, found 1,000,0"),
    ],
)
def test_malformed_tools_and_options_are_named(column: str, value: Any, message: str) -> None:
    with pytest.raises(FeedbackRowError, match=message):
        talk(turn("user"), turn("assistant"), **{column: value})


def test_no_error_holds_the_text_of_a_message() -> None:
    secret = "born in Bremen"
    malformed: list[list[dict[str, Any]]] = [
        [turn(secret, "x"), turn("assistant")],
        [turn("user", [{"type": secret}]), turn("assistant")],
        [turn("user", [secret, {"text": secret}]), turn("assistant")],
        [turn("user"), turn("assistant", None, tool_calls=[secret])],
    ]
    for messages in malformed:
        with pytest.raises(FeedbackRowError) as caught:
            parse({"messages": messages, "label": True})
        assert secret not in str(caught.value)
