"""The records of a source become rated rows, reasons and errors, and nothing else, in one way for all readers."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bco_lightning.batch import FeedbackRow, LeftOut
from bco_lightning.data.feedback_beside import FeedbackBeside
from bco_lightning.data.formats import FORMATS
from bco_lightning.data.options import Columns, Rating
from bco_lightning.data.rows import RowFormat, RowMaker
from bco_lightning.data.values import value_at
from bco_lightning.errors import FeedbackRowError
from tests.conftest import write_jsonl
from tests.unit.made_rows import made, records_of, row_of, rows_of

LOGS = Path(__file__).parent.parent / "data" / "feedback_logs"
GOOD = {"prompt": "Hello?", "completion": "Hi.", "label": True}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


def test_texts_become_messages_with_a_thumb() -> None:
    assert row_of(GOOD) == FeedbackRow(
        [{"role": "user", "content": "Hello?"}], [{"role": "assistant", "content": "Hi."}], True, "x:1"
    )


def test_the_vocabulary_is_that_of_the_whole_source(tmp_path: Path) -> None:
    log = write_jsonl(tmp_path / "a.jsonl", [{**GOOD, "label": label} for label in (1, "up", -1)])
    first, second, third = rows_of(log, RowMaker(RowFormat()))
    assert isinstance(first, FeedbackRow)
    assert isinstance(third, FeedbackRow)
    assert (first.thumbs_up, third.thumbs_up) == (True, False)
    assert isinstance(second, FeedbackRowError)
    assert str(second).startswith(f'{log}:2: label "up" mixes two vocabularies; labels so far were 1.')


def test_the_first_record_with_marks_of_a_format_decides_for_all(tmp_path: Path) -> None:
    unclear, row = {"question": "a"}, {"messages": "x"}
    log = write_jsonl(tmp_path / "a.jsonl", [unclear, PAIR, row])
    maker = RowMaker(RowFormat())
    malformed, better, worse, other = rows_of(log, maker)
    assert maker.format == "paired"
    assert [row.thumbs_up for row in (better, worse) if isinstance(row, FeedbackRow)] == [True, False]
    assert "expected a column 'chosen', found 'question'" in str(malformed)
    assert "expected a column 'chosen', found 'messages'" in str(other)


def test_a_source_without_marks_is_taken_for_rows_and_all_of_it_is_read() -> None:
    maker = RowMaker(RowFormat())
    records = [(number, {"question": number}) for number in range(300)]
    assert list(maker.learn(iter(records))) == records
    assert maker.format == "unpaired"


def test_what_was_learned_goes_to_other_processes() -> None:
    maker = RowMaker(RowFormat())
    maker.learn(iter([("", GOOD)]))
    maker.rows({**GOOD, "label": -1}, "x:1")
    copy = pickle.loads(pickle.dumps(maker))  # noqa: S301 - our own
    assert copy.format == "unpaired"
    [error] = copy.rows({**GOOD, "label": 0}, "x:2")
    assert "mixes two vocabularies; labels so far were -1" in str(error)


def test_a_rule_or_a_map_leaves_rows_out() -> None:
    stars = RowFormat(rating=Rating("stars", up=4, down=2))
    assert made({**GOOD, "stars": 3}, stars) == [LeftOut("x:1", "rating between thumbs-up and thumbs-down")]
    words = RowFormat(columns=Columns(thumbs={"good": "up", "bad": "down", "unsure": "drop"}))
    assert made({**GOOD, "label": "unsure"}, words) == [LeftOut("x:1", "label mapped to drop")]


def test_tools_and_trailing_messages_stay_with_the_rated_row() -> None:
    talk = [{"role": role, "content": "..."} for role in ("user", "assistant", "user")]
    options = {"enable_thinking": False}
    row = row_of({"messages": talk, "label": 1, "tools": [{"name": "f"}], "chat_template_kwargs": options})
    assert (row.tools, row.template_options, row.num_trailing) == ([{"name": "f"}], options, 1)


def test_columns_can_be_renamed() -> None:
    columns = Columns("question", "answer", "thumb")
    assert row_of({"question": "a", "answer": "b", "thumb": "down"}, RowFormat(columns=columns)).thumbs_up is False


def test_a_response_is_a_completion_unless_there_is_one_or_it_has_another_name() -> None:
    def completion(columns: Columns, **record: str) -> str:
        row = row_of({"prompt": "a", **record}, RowFormat(columns=columns), labelled=False)
        return str(row.completion[0]["content"])

    assert completion(Columns(), response="b") == "b"
    assert completion(Columns(), response="b", completion="c") == "c"
    with pytest.raises(FeedbackRowError, match="expected a column 'answer', found 'prompt', 'response'"):
        completion(Columns(completion="answer"), response="b")


def test_a_name_with_dots_is_first_a_column_and_then_a_way_into_objects() -> None:
    assert value_at({"a.b": 1, "a": {"b": 2}}, "a.b") == 1
    assert value_at({"a": {"b": {"c": None}}}, "a.b.c", 7) is None
    for record in ({"a": 3}, {"a": {"x": 3}}, {"a": None}, {}):
        assert value_at(record, "a.b.c", 7) == 7


def test_an_error_holds_neither_the_text_of_the_row_nor_the_record() -> None:
    [error] = made({**GOOD, "prompt": "my secret", "completion": {"text": "my secret"}})
    assert isinstance(error, FeedbackRowError)
    assert "secret" not in str(error)
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
    "ranked": ["prompt", "answers", "conversation_history", "message_tree_id"],
    "compared": ["prompt", "response_a", "response_b", "winner", "overall_preference", "response1", "response2"],
    "paired": ["prompt", "chosen", "rejected", "tools"],
    "open_webui": ["data", "meta", "snapshot", "type"],
    "langfuse": ["input", "output", "scores", "user-feedback", "traceId"],
    "langsmith": ["inputs", "outputs", "feedback", "feedback_stats", "extra"],
    "argilla": ["fields", "responses", "label.responses", "label.responses.status", "prompt", "completion"],
    "chainlit": ["steps", "userId", "feedback"],
    "chitchat": ["messages", "ratings", "start"],
    "librechat": ["conversationId", "messages", "messagesTree", "options"],
    "label_studio": ["data", "annotations"],
    "mlflow": ["trace_id", "request", "response", "assessments", "info", "data"],
    "opik": ["input", "output", "feedback_scores", "trace", "error_info"],
    "phoenix": ["context", "attributes", "status_code"],
    "weave": ["op_name", "inputs", "output", "summary", "exception"],
    "helicone": ["request_id", "request_body", "response_body", "feedback_rating", "scores"],
    "tensorzero": ["function_name", "variant_name", "input", "output", "id"],
    "anythingllm": ["prompt", "response", "rating", "workspace", "sent_at", "attachments"],
    "dify": ["user_query", "ai_response", "feedback_rating", "feedback_rating_raw", "conversation_id"],
}


FEEDBACK = {
    "phoenix": FeedbackBeside(str(LOGS / "phoenix_annotations.json")),
    "tensorzero": FeedbackBeside(str(LOGS / "tensorzero_feedback.jsonl")),
}


def check(name: str, given_record: dict[str, Any]) -> None:
    rating = Rating("interesting", up=4, down=3) if name == "chitchat" else None
    outcomes = made(given_record, RowFormat(name, rating=rating, feedback=FEEDBACK.get(name, FeedbackBeside())))  # type: ignore[arg-type]
    assert outcomes, f"{name} lost a record"
    for outcome in outcomes:
        if isinstance(outcome, FeedbackRowError):
            assert str(outcome).startswith("x:1: ")
        elif isinstance(outcome, FeedbackRow):
            assert isinstance(outcome.thumbs_up, bool)
            json.dumps(outcome.prompt + outcome.completion, ensure_ascii=False, default=str).encode()
        else:
            assert outcome.place == "x:1"


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_record_gives_a_row_a_reason_or_a_clear_error(name: str, data: st.DataObject) -> None:
    columns = st.dictionaries(st.sampled_from(COLUMNS[name]), values | near_messages | near_objects, max_size=6)
    check(name, data.draw(columns))


FILES = {
    "unpaired": "conversations.jsonl", "ranked": "public/oasst2.trees.jsonl",
    "compared": "public/arena-human-preference-140k.jsonl", "paired": "pairs_of_conversations.jsonl",
    "open_webui": "open_webui.json",
    "langfuse": "langfuse_traces.json", "langsmith": "langsmith_runs.jsonl", "argilla": "argilla.json",
    "chainlit": "chainlit.json", "chitchat": "chitchat.json", "librechat": "librechat.json",
    "label_studio": "label_studio.json", "mlflow": "mlflow_traces.jsonl", "opik": "opik.jsonl",
    "phoenix": "phoenix_spans.json", "weave": "weave.jsonl", "helicone": "helicone.jsonl",
    "tensorzero": "tensorzero_inferences.jsonl", "anythingllm": "anythingllm.json", "dify": "dify.json",
}  # fmt: skip
ODD: list[Any] = [
    None, True, 7, float("nan"), " ", "x", "\x00", "\ud800", [None], {}, {"role": "user"}, [[]],
    '{"role": "user", "content": [1]}', '[{"from": "\\ud800", "value": {}}]', '["{}"]',
]  # fmt: skip


def places_in(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value in a record."""
    keys: Any = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [way, *(place for key in keys for place in places_in(value[key], (*way, key)))]


def with_value(value: Any, way: tuple[Any, ...], new: Any) -> Any:
    if not way:
        return new
    if isinstance(value, dict):
        return {key: with_value(part, way[1:], new) if key == way[0] else part for key, part in value.items()}
    return [with_value(part, way[1:], new) if number == way[0] else part for number, part in enumerate(value)]


@pytest.mark.parametrize("name", FORMATS)
def test_no_value_of_a_real_record_can_break_its_format(name: str) -> None:
    for _, given_record in records_of(str(LOGS / FILES[name])):
        for number, way in enumerate(places_in(given_record)[1:]):
            for odd in ODD[number % 5 :: 5]:
                check(name, with_value(given_record, way, odd))


@pytest.mark.parametrize("name", FORMATS)
def test_deep_nesting_is_refused_or_left_alone(name: str) -> None:
    for key in ("messages", "content", "x"):
        deep: Any = "..."
        for _ in range(900):
            deep = {key: deep}
        for column in COLUMNS[name]:
            check(name, {**dict.fromkeys(COLUMNS[name], "..."), column: deep, "user-feedback": [1]})
            check(name, {**{other: [deep] for other in COLUMNS[name]}, column: [[deep]]})


UNUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "ids and weights": ({**GOOD, "id": "x", "weight": 0.5, "tags": [], "note": ""}, ["id", "weight"]),
    "a history": ({**GOOD, "history": [["a", "b"]], "input": "c"}, ["history", "input"]),
    "what is used": ({**GOOD, "system": "a", "tools": [], "chat_template_kwargs": {"a": 1}}, []),
    "a prompt beside a conversation": (
        {"messages": [{"role": role, "content": "a"} for role in ("user", "assistant")], "prompt": "a", "label": 1},
        ["prompt"],
    ),
    "a conversation beside a completion": ({**GOOD, "messages": "x"}, ["messages"]),
    "a pair": ({**PAIR, "label": 1, "score_chosen": 8}, ["label", "score_chosen"]),
}


@pytest.mark.parametrize(("record", "names"), UNUSED.values(), ids=UNUSED)
def test_columns_that_no_row_is_made_of_are_named_once(record: dict[str, Any], names: list[str]) -> None:
    maker = RowMaker(RowFormat())
    for place, same in maker.learn(iter([("x:1", record), ("x:2", record)])):
        maker.rows(same, place)
    assert maker.unused == names


def test_a_column_of_which_a_part_or_a_rating_is_used_is_not_named() -> None:
    columns, rule = Columns(label="feedback.score"), Rating("stars", up=4, down=2, untouched={"tone": 3})
    for options in (RowFormat("unpaired", columns=columns), RowFormat("unpaired", rating=rule)):
        maker = RowMaker(options)
        maker.rows({**GOOD, "feedback": {"score": 1}, "stars": 5, "tone": 1, "x": 1}, "x:1")
        assert "x" in maker.unused
        assert {"feedback"} & set(maker.unused) == ({"feedback"} if options.rating else set())
        assert {"stars", "tone"} & set(maker.unused) == (set() if options.rating else {"stars", "tone"})


def test_rows_may_lack_a_label_but_not_all_rows(tmp_path: Path) -> None:
    unrated = {"prompt": "a", "completion": "b"}
    nested, whole = RowFormat(columns=Columns(label="feedback.score")), RowFormat()
    stars = RowFormat(rating=Rating("stars", up=4, down=2))
    for options, rated, other in (
        (whole, GOOD, unrated), (nested, {**unrated, "feedback": {"score": 1}}, {**unrated, "feedback": None}),
        (stars, {**unrated, "stars": 5}, unrated),
    ):  # fmt: skip
        log = write_jsonl(tmp_path / "log.jsonl", [other, rated, other])
        assert [row.reason for row in rows_of(log, RowMaker(options)) if isinstance(row, LeftOut)] == [
            "no feedback"
        ] * 2
        name, kind = ("stars", "rating") if options is stars else (options.columns.label, "column")
        with pytest.raises(
            FeedbackRowError, match=f"log.jsonl:1: expected a {kind} '{name}', found 'prompt', 'completion"
        ):
            list(rows_of(write_jsonl(tmp_path / "log.jsonl", [other] * 3), RowMaker(options)))
