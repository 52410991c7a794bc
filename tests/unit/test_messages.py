"""Messages of every layout come to one form."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bco_lightning.data.messages import check_size, messages_in
from bco_lightning.data.values import without_nulls
from bco_lightning.errors import FeedbackRowError


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
