"""A rated completion, in columns of its own or as the last turn of a conversation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from bco_lightning.batch import FeedbackRow
from bco_lightning.data.options import Columns, Rating
from bco_lightning.data.rows import RowFormat
from bco_lightning.errors import FeedbackRowError
from tests.unit.made_rows import made, records_of, row_of

CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Bremen", "unit": null}'},
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def turn(role: str, content: Any = "...", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def talk(*messages: dict[str, Any], loss_on: Any = "rated_turn", **more: Any) -> FeedbackRow:
    return row_of({"messages": list(messages), "label": True, **more}, RowFormat("unpaired", loss_on=loss_on))


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
    assert roles(row_of(record, RowFormat(loss_on="all_turns"))) == (["user"], ["assistant", "user", "assistant"])
    assert roles(row_of(record)) == (["user", "assistant", "user"], ["assistant"])


@pytest.mark.parametrize("column", ["messages", "conversation", "conversations", "chat"])
def test_conversations_are_found_under_their_usual_names(column: str) -> None:
    record = {column: [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "label": 1}
    assert row_of(record).prompt == [{"role": "user", "content": "a"}]
    assert row_of(record).completion == [{"role": "assistant", "content": "b"}]


def test_a_named_column_comes_before_prompt_and_completion() -> None:
    record = {"prompt": "a", "completion": "b", "turns": [turn("user", "c"), turn("assistant", "d")], "label": 1}
    assert row_of(record, RowFormat(columns=Columns(messages="turns"))).completion[0]["content"] == "d"
    assert row_of(record).completion[0]["content"] == "b"


def test_a_conversation_can_be_json_text_as_in_a_csv(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    messages = json.dumps([turn("user", "a"), turn("assistant", "b")]).replace('"', '""')
    log.write_text(f'messages,label\n"{messages}",1\n')
    [(_, record)] = records_of(str(log))
    assert row_of(record).completion == [{"role": "assistant", "content": "b"}]


def test_keys_that_a_parquet_file_fills_up_are_gone(tmp_path: Path) -> None:
    messages = [turn("user", "a"), turn("assistant", None, tool_calls=[CALL]), turn("tool", "rain", tool_call_id="c1")]
    Dataset.from_list([{"messages": [*messages, turn("assistant", "b")], "label": True, "tools": TOOLS}]).to_parquet(
        tmp_path / "log.parquet"
    )
    [(_, record)] = records_of(str(tmp_path / "log.parquet"))
    row = row_of(record)
    assert row.prompt == [turn("user", "a")]
    call = {**CALL, "function": {"name": "weather", "arguments": {"city": "Bremen", "unit": None}}}
    assert row.completion == [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "rain", "tool_call_id": "c1"},
        {"role": "assistant", "content": "b"},
    ]
    assert row.tools == TOOLS


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), list(map(json.dumps, TOOLS))])
def test_tools_are_a_list_or_json_text_of_it_or_of_each(tools: Any) -> None:
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
    row = row_of(record, RowFormat(columns=columns, rating=Rating(up=4, down=3)))
    assert (row.prompt[0]["content"], row.completion[0]["content"], row.tools) == ("a", "b", TOOLS)
    assert row.thumbs_up is True
    assert (
        row_of(record, RowFormat(columns=columns, rating=Rating("feedback.clarity", up=4, down=3))).thumbs_up is False
    )


def test_with_a_rule_that_names_a_column_no_label_is_needed() -> None:
    options = RowFormat(rating=Rating("stars", up=4, down=3))
    assert row_of({"prompt": "a", "completion": "b", "stars": 5}, options).thumbs_up is True


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("messages", "3", "'messages' must be a list of chat messages, found a value of type int"),
        ("messages", [turn("user"), turn("assistant", None, tool_calls=[{}])], "message 2 .* a list of function calls"),
        ("messages", [turn("user", [7]), turn("assistant")], "must have text parts as its content, found 7"),
        ("messages", [turn("user", x="\ud800"), turn("assistant")], "half of a surrogate pair"),
        ("tools", "[", "'tools' must hold JSON, found \"\\[\" that is none"),
        ("tools", [{"a": "\x00"}], "found a NUL character"),
        ("chat_template_kwargs", {"a": "\ud800"}, "half of a surrogate pair"),
        ("chat_template_kwargs", {"a": "x" * 1_000_001}, "at most 1,000,000 characters in a row, found 1,000,0"),
    ],
)
def test_what_is_malformed_is_named(column: str, value: Any, message: str) -> None:
    with pytest.raises(FeedbackRowError, match=message):
        talk(**{"messages": [turn("user"), turn("assistant")], column: value})


def test_no_error_holds_the_text_of_a_message() -> None:
    secret = "born in Bremen"
    malformed: list[list[dict[str, Any]]] = [
        [turn(secret, "x"), turn("assistant")],
        [turn("user", [{"type": secret}]), turn("assistant")],
        [turn("user", [secret, {"type": "x", "text": secret}]), turn("assistant")],
        [turn("user"), turn("assistant", None, tool_calls=[secret])],
    ]
    for messages in malformed:
        with pytest.raises(FeedbackRowError) as caught:
            row_of({"messages": messages, "label": True}, RowFormat("unpaired"))
        assert secret not in str(caught.value)


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("name", ["system", "system_prompt"])
@pytest.mark.parametrize("record", [
    {"prompt": "a", "completion": "b"},
    {"prompt": [turn("user", "a")], "completion": "b"},
    {"messages": [turn("user", "a"), turn("assistant", "b")]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"messages": [{**SYSTEM, "content": " Be brief.\n"}, turn("user", "a"), turn("assistant", "b")]},
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"chosen": [turn("user", "a"), turn("assistant", "b")], "rejected": [turn("user", "a"), turn("assistant", "c")]},
], ids=["texts", "messages", "conversation", "ShareGPT", "the same one", "pair", "pair of two"])  # fmt: skip
def test_a_system_prompt_in_a_column_leads_the_messages(name: str, record: dict[str, Any]) -> None:
    for system in ("Be brief.", [SYSTEM], json.dumps([SYSTEM])):
        for row in made({**record, name: system, **({} if "chosen" in record else {"label": 1})}):
            assert isinstance(row, FeedbackRow)
            assert [(message["role"], message["content"].strip()) for message in row.prompt] == [
                ("system", "Be brief."), ("user", "a")
            ]  # fmt: skip


@pytest.mark.parametrize("system", [None, "", " ", []])
def test_no_system_prompt_in_a_column_is_none(system: Any) -> None:
    assert talk(turn("user"), turn("assistant"), system=system).prompt == [turn("user")]


@pytest.mark.parametrize(("system", "error"), [
    ("Be kind.", "expected in 'system' the system prompt of the messages, found another one. Keep one, or set"),
    ([turn("user")], "expected in 'system' the system prompt of the messages, found another one"),
    (7, "'system' must be text or a list of chat messages, found a value of type int"),
])  # fmt: skip
def test_another_system_prompt_than_that_of_the_messages_is_refused(system: Any, error: str) -> None:
    with pytest.raises(FeedbackRowError, match=error):
        talk(SYSTEM, turn("user"), turn("assistant"), system=system)


def test_the_column_of_the_system_prompt_can_be_renamed() -> None:
    record = {"prompt": "a", "completion": "b", "label": 1, "system": 7, "told": "Be brief."}
    assert row_of(record, RowFormat(columns=Columns(system="told"))).prompt[0] == SYSTEM
