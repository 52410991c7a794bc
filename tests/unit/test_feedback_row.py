"""A row is validated, or refused with its place and reason."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bco_lightning.batch import FeedbackRow, LeftOut
from bco_lightning.data.feedback_row import Columns, LabelVocabulary, parse_row, value_at
from bco_lightning.errors import ConfigError, FeedbackRowError

GOOD = {"prompt": "Hello?", "completion": "Hi.", "label": True}


def parse(**changes: Any) -> FeedbackRow:
    row = parse_row({**GOOD, **changes}, "log.jsonl:7", Columns(), LabelVocabulary())
    assert isinstance(row, FeedbackRow)
    return row


def test_texts_become_messages_of_user_and_assistant() -> None:
    row = parse()
    assert row.prompt == [{"role": "user", "content": "Hello?"}]
    assert row.completion == [{"role": "assistant", "content": "Hi."}]
    assert row.thumbs_up is True
    assert row.place == "log.jsonl:7"


@pytest.mark.parametrize(
    ("up", "down"), [(True, False), (1, 0), (1, -1), ("up", "down"), ("true", "false"), ("👍", "👎")]
)
def test_each_vocabulary_is_understood(up: Any, down: Any) -> None:
    labels = LabelVocabulary()
    assert [labels.thumbs_up(value, "here") for value in (up, down, up)] == [True, False, True]


@pytest.mark.parametrize(
    "value",
    [
        "0",
        "1",
        "True",
        "FALSE",
        "yes",
        "",
        " up",
        "Up",
        1.0,
        0.0,
        2,
        -2,
        10**40,
        float("nan"),
        None,
        [],
        {},
        [True],
        "👍🏽",
        "+1",
    ],
)
def test_anything_outside_the_vocabularies_is_refused(value: Any) -> None:
    with pytest.raises(FeedbackRowError, match=r"^log\.jsonl:7: label must be one of true/false, 1/0, 1/-1"):
        parse(label=value)


@pytest.mark.parametrize(
    ("first", "second"), [(True, 1), (0, -1), (1, "up"), ("up", "true"), ("👍", False), (-1, 0), (1, True)]
)
def test_a_mixture_of_two_vocabularies_is_refused(first: Any, second: Any) -> None:
    labels = LabelVocabulary()
    labels.thumbs_up(first, "log.jsonl:1")
    with pytest.raises(FeedbackRowError, match=r"log\.jsonl:2: label .* mixes two vocabularies"):
        labels.thumbs_up(second, "log.jsonl:2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ""}, "'prompt' must hold text"),
        ({"completion": " \n"}, "'completion' must hold text"),
        ({"completion": None}, "'completion' must be text or a list of chat messages, found nothing"),
        ({"prompt": []}, "found an empty list"),
        ({"prompt": 3}, "a value of type int"),
        ({"prompt": ["hello"]}, "message 1 of 'prompt'"),
        ({"prompt": [{"role": "boss", "content": "x"}]}, "'role' out of system, user, assistant, tool"),
        ({"completion": [{"role": "user", "content": "x"}]}, "must begin and end with an assistant message"),
    ],
)
def test_a_bad_field_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FeedbackRowError, match=message) as caught:
        parse(**changes)
    assert caught.value.where == "log.jsonl:7"


def test_a_missing_column_names_those_that_are_there() -> None:
    with pytest.raises(FeedbackRowError, match=r"expected a column 'label', found 'prompt', 'completion', 'rating'"):
        parse_row({"prompt": "a", "completion": "b", "rating": 5}, "x:1", Columns(), LabelVocabulary())


def test_columns_can_be_renamed() -> None:
    row = parse_row(
        {"question": "a", "answer": "b", "thumb": "down"},
        "x:1",
        Columns("question", "answer", "thumb"),
        LabelVocabulary(),
    )
    assert isinstance(row, FeedbackRow)
    assert row.thumbs_up is False


def test_a_response_is_a_completion_unless_there_is_one_or_it_has_another_name() -> None:
    def completion(columns: Columns, **record: str) -> str:
        row = parse_row({"prompt": "a", **record}, "x:1", columns, None)
        assert isinstance(row, FeedbackRow)
        return str(row.completion[0]["content"])

    assert completion(Columns(), response="b") == "b"
    assert completion(Columns(), response="b", completion="c") == "c"
    with pytest.raises(FeedbackRowError, match="expected a column 'answer', found 'prompt', 'response'"):
        completion(Columns(completion="answer"), response="b")


def test_a_label_can_mean_that_the_row_is_left_out() -> None:
    columns = Columns(thumbs={"1": "down", "3": "drop", "5": "up"})
    labels = LabelVocabulary(thumbs=columns.thumbs)
    assert [labels.thumbs_up(value, "x:1") for value in (5, 1)] == [True, False]
    assert labels.thumbs_up(3, "x:2") == LeftOut("x:2", "label mapped to drop")
    assert parse_row({**GOOD, "label": 3}, "x:3", columns, labels) == LeftOut("x:3", "label mapped to drop")


def test_labels_can_only_mean_up_down_and_drop() -> None:
    with pytest.raises(ConfigError, match=r"data\.columns\.thumbs: expected up, down or drop for '3', found 'skip'"):
        Columns(thumbs={"3": "skip"})  # type: ignore[dict-item]


def test_a_look_alike_of_a_label_that_was_understood_is_refused_as_ever() -> None:
    labels = LabelVocabulary()
    assert labels.thumbs_up(1, "x:1") is True
    for look_alike in (True, 1.0, "1"):
        with pytest.raises(FeedbackRowError):
            labels.thumbs_up(look_alike, "x:2")
    assert labels.thumbs_up(1, "x:3") is True


def test_a_name_with_dots_is_first_a_column_and_then_a_way_into_objects() -> None:
    assert value_at({"a.b": 1, "a": {"b": 2}}, "a.b") == 1
    assert value_at({"a": {"b": {"c": None}}}, "a.b.c", 7) is None
    for record in ({"a": 3}, {"a": {"x": 3}}, {"a": None}, {}):
        assert value_at(record, "a.b.c", 7) == 7


def test_an_error_never_holds_the_text_of_the_row() -> None:
    with pytest.raises(FeedbackRowError) as caught:
        parse(prompt="my secret", completion={"text": "my secret"})
    assert "secret" not in str(caught.value)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(["prompt", "completion", "label", "other"]), values))
def test_any_record_gives_a_row_or_a_clear_error(record: dict[str, Any]) -> None:
    try:
        row = parse_row(record, "x:1", Columns(), LabelVocabulary())
    except FeedbackRowError as error:
        assert str(error).startswith("x:1: ")
    else:
        assert isinstance(row.thumbs_up, bool)
