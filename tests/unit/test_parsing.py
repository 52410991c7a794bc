"""The records of a source become rows, reasons and errors, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bco_lightning.batch import FeedbackRow, LeftOut
from bco_lightning.data.feedback_row import Columns
from bco_lightning.data.formats import FORMATS
from bco_lightning.data.formats.record_format import Candidate
from bco_lightning.data.parsing import RecordParser
from bco_lightning.data.records import read_records
from bco_lightning.data.source import Rating, RowFormat
from bco_lightning.errors import FeedbackRowError

LOGS = Path(__file__).parent.parent / "data" / "feedback_logs"


def record(label: Any = True, **more: Any) -> dict[str, Any]:
    return {"prompt": "a", "completion": "b", "label": label, **more}


def test_a_row_gets_its_thumb_once_it_is_rated() -> None:
    parser = RecordParser(RowFormat())
    [candidate] = parser.candidates(record("down"), "x:1")
    assert isinstance(candidate, Candidate)
    assert candidate.row.thumbs_up is None
    row = parser.rated(candidate)
    assert isinstance(row, FeedbackRow)
    assert row.thumbs_up is False
    assert (row.prompt, row.completion, row.place) == (candidate.row.prompt, candidate.row.completion, "x:1")


def test_the_vocabulary_is_that_of_the_whole_source() -> None:
    parser = RecordParser(RowFormat())
    first, second = (next(parser.candidates(record(label), "x:1")) for label in (1, "up"))
    assert isinstance(first, Candidate)
    assert isinstance(second, Candidate)
    parser.rated(first)
    with pytest.raises(FeedbackRowError, match="mixes two vocabularies"):
        parser.rated(second)


def test_a_rule_leaves_rows_out_before_they_are_tokenized() -> None:
    parser = RecordParser(RowFormat(rating=Rating("stars", up=4, down=2)))
    assert list(parser.candidates(record(stars=3), "x:1")) == [
        LeftOut("x:1", "rating between thumbs-up and thumbs-down")
    ]


def test_a_bad_rating_of_one_annotator_leaves_the_others() -> None:
    parser = RecordParser(RowFormat(rating=Rating("stars", up=4, down=2)))
    responses = [{"value": value, "user_id": "u"} for value in ("?", 5)]
    items = list(
        parser.candidates({"fields": {"prompt": "a", "completion": "b"}, "responses": {"stars": responses}}, "x:1")
    )
    assert [type(item) for item in items] == [FeedbackRowError, Candidate]


def test_tools_and_trailing_messages_stay_with_the_rated_row() -> None:
    talk = [{"role": role, "content": "..."} for role in ("user", "assistant", "user")]
    parser = RecordParser(RowFormat())
    options = {"enable_thinking": False}
    [candidate] = parser.candidates(
        {"messages": talk, "label": 1, "tools": [{"name": "f"}], "chat_template_kwargs": options}, "x:1"
    )
    assert isinstance(candidate, Candidate)
    row = parser.rated(candidate)
    assert isinstance(row, FeedbackRow)
    assert (row.tools, row.template_options, row.num_trailing) == ([{"name": "f"}], options, 1)


def test_an_error_does_not_carry_the_record_along() -> None:
    [error] = RecordParser(RowFormat()).candidates(record(completion="\ud800"), "x:1")
    assert isinstance(error, FeedbackRowError)
    assert error.__cause__ is None
    assert error.__traceback__ is None


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = [
    "role",
    "content",
    "from",
    "value",
    "tool_calls",
    "type",
    "text",
    "lc",
    "id",
    "kwargs",
    "data",
    "function",
    "name",
]
ROLES = st.sampled_from(["user", "assistant", "tool", "system", "human", "gpt", "ai"])
near_messages = st.lists(st.dictionaries(st.sampled_from(KEYS), values | ROLES) | values, max_size=4)
near_objects = st.dictionaries(
    st.sampled_from(
        ["messages", "generations", "choices", "chat", "history", "params", "label", "prompt", "completion"]
    ),
    values | near_messages,
    max_size=4,
)
COLUMNS = {
    "unpaired": ["prompt", "completion", "messages", "label", "tools", "chat_template_kwargs", "response"],
    "paired": ["prompt", "chosen", "rejected", "tools"],
    "open_webui": ["data", "meta", "snapshot", "type"],
    "langfuse": ["input", "output", "scores", "user-feedback", "traceId"],
    "langsmith": ["inputs", "outputs", "feedback", "feedback_stats", "extra"],
    "argilla": ["fields", "responses", "label.responses", "label.responses.status", "prompt", "completion"],
    "chainlit": ["steps", "userId", "feedback"],
    "chitchat": ["messages", "ratings", "start"],
}


def check(name: str, options: RowFormat, given_record: dict[str, Any]) -> None:
    parser = RecordParser(options)
    items = list(parser.candidates(given_record, "x:1"))
    assert items, f"{name} lost a record"
    for item in items:
        if isinstance(item, FeedbackRowError):
            assert str(item).startswith("x:1: ")
        elif isinstance(item, Candidate):
            try:
                outcome = parser.rated(item)
            except FeedbackRowError as error:
                assert str(error).startswith("x:1: ")
            else:
                assert isinstance(outcome, LeftOut) or isinstance(outcome.thumbs_up, bool)
                json.dumps(item.row.prompt + item.row.completion, ensure_ascii=False).encode()
        else:
            assert isinstance(item, LeftOut)
            assert item.place == "x:1"


def options_for(name: str) -> RowFormat:
    return RowFormat(name, rating=Rating("interesting", up=4, down=3) if name == "chitchat" else None)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_record_gives_a_row_a_reason_or_a_clear_error(name: str, data: st.DataObject) -> None:
    columns = st.dictionaries(st.sampled_from(COLUMNS[name]), values | near_messages | near_objects, max_size=6)
    check(name, options_for(name), data.draw(columns))


FILES = {
    "unpaired": "conversations.jsonl", "paired": "pairs_of_conversations.jsonl", "open_webui": "open_webui.json",
    "langfuse": "langfuse_traces.json", "langsmith": "langsmith_runs.jsonl", "argilla": "argilla.json",
    "chainlit": "chainlit.json", "chitchat": "chitchat.json",
}  # fmt: skip


def places_in(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value in a record."""
    keys: list[Any] = (
        list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    )
    return [way, *(place for key in keys for place in places_in(value[key], (*way, key)))]


def with_value(value: Any, way: tuple[Any, ...], new: Any) -> Any:
    if not way:
        return new
    if isinstance(value, dict):
        return {key: with_value(part, way[1:], new) if key == way[0] else part for key, part in value.items()}
    return [with_value(part, way[1:], new) if number == way[0] else part for number, part in enumerate(value)]


ODD: list[Any] = [
    None,
    True,
    7,
    -1.5,
    float("nan"),
    "",
    " ",
    "x",
    "\x00",
    "\ud800",
    [],
    [None],
    {},
    {"role": "user"},
    [[]],
]


@pytest.mark.parametrize("name", FORMATS)
def test_no_value_of_a_real_record_can_break_its_format(name: str) -> None:
    for _, given_record in read_records(str(LOGS / FILES[name]), "label"):
        for way in places_in(given_record):
            for odd in ODD if way else ():
                check(name, options_for(name), with_value(given_record, way, odd))


@pytest.mark.parametrize("name", FORMATS)
def test_deep_nesting_is_refused_or_left_alone(name: str) -> None:
    for key in ("messages", "content", "x"):
        deep: Any = "..."
        for _ in range(900):
            deep = {key: deep}
        for column in COLUMNS[name]:
            check(name, options_for(name), {**dict.fromkeys(COLUMNS[name], "..."), column: deep, "user-feedback": [1]})
            check(name, options_for(name), {**{other: [deep] for other in COLUMNS[name]}, column: [[deep]]})


def test_a_map_that_drops_labels_leaves_rows_out() -> None:
    parser = RecordParser(RowFormat(columns=Columns(thumbs={"good": "up", "bad": "down", "unsure": "drop"})))
    [candidate] = parser.candidates(record("unsure"), "x:1")
    assert isinstance(candidate, Candidate)
    assert parser.rated(candidate) == LeftOut("x:1", "label mapped to drop")
